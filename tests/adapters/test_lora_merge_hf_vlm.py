"""Merging LoRA weights into models of the generic adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_vlm_samples import to_older_layout
from test_hf_vlm_tuner import write_tunable_gemma3, write_vipllava
from torch import Tensor
from tuned_models import load, save, tune

from kuea_mllm.adapters.hf_vlm.adapter import HFVLMAdapter
from kuea_mllm.model_files import tensor_entries
from kuea_mllm.swapping.verify import verify_model
from kuea_mllm.tuning.merge import merge_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


ADAPTER = HFVLMAdapter()


@torch.no_grad()
def logits_of(model: Any, base: Path) -> Tensor:
    form = ADAPTER.tuning_format(base, max_length=64)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, form.image_size, form.image_size, generator=generator)
    ids = torch.tensor([[1, 40, *[form.image_token_id] * form.tokens_per_image, 50, 300, 262]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    logits: Tensor = model.get_output_embeddings()(ADAPTER.hidden_states(model, batch))
    return logits


@pytest.mark.parametrize(
    "write", [write_vipllava, write_tunable_gemma3], ids=["vipllava", "gemma3"]
)
@pytest.mark.parametrize("is_older", [False, True], ids=["today", "older"])
def test_merged_logits_are_those_of_the_lora_model(
    write: Callable[[Path], Path], is_older: bool, tmp_path: Path
) -> None:
    base = write(tmp_path / "base")
    if is_older:
        to_older_layout(base)
    model = tune(base)
    merge_adapter(None, save(model, base, tmp_path / "adapter"), tmp_path / "merged")
    merged = load(tmp_path / "merged")
    tuned = logits_of(model.get_base_model(), base)
    assert float((logits_of(merged, base) - tuned).abs().max()) <= 1e-4
    assert float((logits_of(load(base), base) - tuned).abs().max()) > 1e-2
    assert verify_model(tmp_path / "merged").problems == ()
    assert tensor_entries(base) == tensor_entries(tmp_path / "merged")
