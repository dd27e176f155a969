"""Swapping in a model that is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from toy_mllm import ADAPTER, ToyAdapter, make_tower

from kuea_mllm.adapters import registry
from kuea_mllm.adapters.base import AdapterManifest
from kuea_mllm.errors import KueaError, TowerMismatch, UserError
from kuea_mllm.swapping import swap_tower


def test_swap_in_memory_keeps_dtype_and_parameters() -> None:
    whole: Any = make_tower(0).model
    model = whole.vision_model.to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    receipt = swap_tower(model, make_tower(1), ADAPTER)
    assert receipt.dtype == "bfloat16"
    assert receipt.fingerprint_before != receipt.fingerprint_after
    assert all(parameters[name] is p for name, p in model.named_parameters())
    with pytest.raises(TowerMismatch, match="holds already"):
        swap_tower(model, make_tower(1), ADAPTER)


def test_module_without_configuration_is_refused() -> None:
    with pytest.raises(KueaError, match="no transformers configuration"):
        swap_tower(nn.Linear(2, 2), make_tower(1), ADAPTER)


def test_adapter_is_found_by_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import kuea_mllm

    monkeypatch.setattr(
        registry,
        "_discover",
        lambda: ({"toy": AdapterManifest("toy", "a toy", "toy_mllm:ToyAdapter")}, {}),
    )
    whole: Any = make_tower(0).model
    model = whole.vision_model
    with pytest.raises(UserError, match="no adapter recognises"):
        swap_tower(model, make_tower(1))
    monkeypatch.setattr(ToyAdapter, "recognises", lambda self, config: True)
    assert kuea_mllm.swap_tower(model, make_tower(1)).adapter == "toy"
    with pytest.raises(UserError, match="no transformers configuration to find"):
        swap_tower(nn.Linear(2, 2), make_tower(1))


def test_tensors_that_are_not_there_are_refused() -> None:
    whole: Any = make_tower(0).model
    model = whole.vision_model.to("meta")
    with pytest.raises(UserError, match="device meta"):
        swap_tower(model, make_tower(1), ADAPTER)


def test_quantised_tensors_are_refused_before_anything_is_written() -> None:
    whole: Any = make_tower(0).model
    model = whole.vision_model
    layer = model.encoder.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.uint8), requires_grad=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TowerMismatch, match="which is quantised"):
        swap_tower(model, make_tower(1), ADAPTER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nan_leaves_the_model_as_it_was() -> None:
    whole: Any = make_tower(0).model
    model, bad = whole.vision_model, make_tower(1)
    with torch.no_grad():
        bad.model.state_dict()["vision_model.post_layernorm.bias"][0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TowerMismatch, match="NaN"):
        swap_tower(model, bad, ADAPTER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_activation_needs_force() -> None:
    whole: Any = make_tower(0).model
    tower = make_tower(1)
    tower.spec = replace(tower.spec, activation="gelu")
    with pytest.raises(TowerMismatch, match="activation is gelu"):
        swap_tower(whole.vision_model, tower, ADAPTER)
    receipt = swap_tower(whole.vision_model, tower, ADAPTER, force=True)
    assert receipt.compatibility is not None
    assert [c.name for c in receipt.compatibility.checks if c.forced] == ["activation"]
