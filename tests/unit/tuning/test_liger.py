"""Liger kernels stay only if they compute the same; here with stand-ins in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_tuned import PARTS, tiny_model
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.config.lora import LoraConfig
from kuea_mllm.errors import EnvironmentFailure, UserError
from kuea_mllm.tuning.liger import BOUNDS, patch_layers, require_parity, use_liger
from kuea_mllm.tuning.loss import supervised_positions
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.wrap import wrap_with_lora

Calls = dict[str, int]


def norm(x: Tensor, weight: Tensor, eps: float, **settings: Any) -> Tensor:
    assert settings == {"offset": 0.0, "casting_mode": "llama", "in_place": False}
    wide = x.float()
    return weight * (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * gate.sigmoid() * up


RIGHT: dict[str, Callable[..., Any]] = {
    "liger_rms_norm": norm,
    "liger_swiglu": swiglu,
    "liger_rope": apply_rotary_pos_emb,
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Put a package of the name in place, and count what is called of it."""

    def put(**changes: Callable[..., Any]) -> Calls:
        calls: Calls = dict.fromkeys(RIGHT, 0)
        package = ModuleType("liger_kernel.transformers.functional")
        for name, function in {**RIGHT, **changes}.items():

            def counted(*given: Any, _of: Any = function, _name: str = name, **named: Any) -> Any:
                calls[_name] += 1
                return _of(*given, **named)

            setattr(package, name, counted)
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, package.__name__, package)
        return calls

    return put


def tuned(autocast: torch.dtype = torch.float32) -> TuningModel:
    model = tiny_model()
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.3)
    wrapped = wrap_with_lora(model, PARTS, LoraConfig(rank=4, alpha=8, projector="freeze"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return TuningModel(wrapped, LlavaAdapter(), PARTS, chunk=8, autocast=autocast)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
    predicting, targets = supervised_positions(ids)
    mask = torch.ones_like(ids)
    return {
        "input_ids": ids, "attention_mask": mask, "predicting": predicting, "targets": targets
    }  # fmt: skip


def gate(model: TuningModel) -> Any:
    language_model = model.inner.get_submodule(PARTS.language_model)
    return require_parity(model, batch(), lambda: patch_layers(language_model))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_right_kernels_pass_and_stay(dtype: torch.dtype, install: Callable[..., Calls]) -> None:
    calls, model = install(), tuned(dtype)
    drawn = torch.get_rng_state()
    parity = gate(model)
    assert parity.worst < BOUNDS[dtype]
    # The training draws what it would have drawn.
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    once = {"liger_rms_norm": 5, "liger_swiglu": 2, "liger_rope": 2}
    assert calls == once
    model.eval()(**batch())
    assert calls == {name: 2 * count for name, count in once.items()}


@pytest.mark.parametrize(
    "wrong",
    [
        {"liger_rms_norm": lambda x, weight, eps, **_: norm(x, weight.square(), eps, **_)},
        {"liger_swiglu": lambda a, b: functional.gelu(a) * b},
        {"liger_rope": lambda q, k, cos, sin: (q, k)},
        {"liger_rope": lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, -sin * 0.98)},
        # The right loss and no gradient.
        {"liger_swiglu": lambda a, b: swiglu(a.detach(), b)},
        {"liger_swiglu": lambda a, b: swiglu(a, b) * float("nan")},
    ],
    ids=["norm", "activation", "no rotation", "angle", "gradient", "nan"],
)
def test_wrong_kernels_are_refused_and_taken_out(
    wrong: dict[str, Any], install: Callable[..., Calls]
) -> None:
    install()
    calls, model = install(**wrong), tuned()
    expected = model.eval()(**batch())
    with pytest.raises(EnvironmentFailure, match=r"another result .* 1e-04 is allowed in float32"):
        gate(model)
    before = dict(calls)
    assert torch.equal(model.eval()(**batch()), expected)
    assert calls == before


def test_other_models_of_the_process_keep_their_kernels(install: Callable[..., Calls]) -> None:
    calls = install()
    other = tuned()
    gate(tuned())
    before = dict(calls)
    other(**batch())
    assert calls == before


def test_missing_package_device_and_family_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    model = tuned()
    with pytest.raises(EnvironmentFailure, match=r"pip install 'kuea-mllm\[liger\]'"):
        gate(model)
    with pytest.raises(UserError, match="run on CUDA only"):
        use_liger(model, batch())
    language_model: Any = model.inner.get_submodule(PARTS.language_model)
    language_model.config.model_type = "mpt"
    with pytest.raises(UserError, match="type 'mpt' with silu are not supported"):
        gate(model)
