"""What is refused before frozen weights are divided among processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_tuned import PARTS, tiny_model

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.errors import UserError
from kuea_mllm.tuning.sharding import is_sharded, require_shardable, shard_frozen


def recipe(**content: Any) -> LoraRecipe:
    return LoraRecipe.parse({"kind": "lora", **content}, origin="test")


def test_one_process_cannot_divide_anything() -> None:
    with pytest.raises(UserError, match=r"runtime\.sharding.*there is one process"):
        require_shardable(recipe(runtime={"sharding": "fsdp"}))


def test_quantised_weights_are_not_divided() -> None:
    with pytest.raises(UserError, match=r"runtime\.sharding.*model\.quantization is nf4"):
        require_shardable(recipe(runtime={"sharding": "fsdp"}, model={"quantization": "nf4"}))


def test_plain_run_needs_nothing() -> None:
    require_shardable(recipe())
    assert not is_sharded(tiny_model())


def test_language_model_without_layers_is_refused() -> None:
    parts = replace(PARTS, language_model="model.multi_modal_projector")
    with pytest.raises(UserError, match="no list of layers"):
        shard_frozen(tiny_model(), parts, torch.device("cpu"), mesh=None)
