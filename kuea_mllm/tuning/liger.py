"""Liger kernels in a language model, and the comparison that decides whether they stay.

Only the functions of liger-kernel are used, put into the layers of the one model that is tuned. Its
own patches change the classes of transformers for the whole process, and its fused cross-entropy
would go around this project's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.errors import EnvironmentFailure, UserError
from kuea_mllm.log import LOGGER
from kuea_mllm.tuning.model import TuningModel

# The beginning of the names of a family's classes in transformers, by its model_type. All of them
# scale by the norm's weight after rounding, and turn the halves of a head.
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
_ROTATION = "apply_rotary_pos_emb"
_OFF = "Set runtime.liger=false."

# How far loss and gradient may be from those of the stock kernels, relative to their size: the
# order of the sums differs, and in bfloat16 what is rounded in between.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Parity:
    """How far a model with other kernels is from itself.

    Attributes:
        loss: Relative difference of the loss.
        gradient: Norm of the difference of all gradients, relative to theirs.
    """

    loss: float
    gradient: float

    @property
    def worst(self) -> float:
        """The larger one; infinite where something is not finite."""
        both = (self.loss, self.gradient)
        return max(both) if all(map(math.isfinite, both)) else math.inf


def require_liger(*, is_cuda: bool) -> None:
    """Make sure that Liger kernels can run, before a model is loaded for them.

    Raises:
        EnvironmentFailure: If liger-kernel is not installed.
        UserError: If the device is not a GPU.
    """
    if not is_cuda:
        raise UserError("key 'runtime.liger' is true, and Liger kernels run on CUDA only.", _OFF)
    _liger_functions()


def use_liger(model: TuningModel, batch: Mapping[str, Tensor]) -> Parity:
    """Put Liger kernels into the language model, after they gave the same on a real batch.

    Args:
        model: With its LoRA layers, on a CUDA device.
        batch: As `TuningModel.forward` takes it.

    Raises:
        EnvironmentFailure: If liger-kernel is not installed, or its kernels compute something else;
            the model is as it was then.
        UserError: If the device or the family of the language model is not supported.
    """
    require_liger(is_cuda=next(model.parameters()).device.type == "cuda")
    language_model = model.inner.get_submodule(model.parts.language_model)
    parity = require_parity(model, batch, lambda: patch_layers(language_model))
    LOGGER.info(
        "Liger kernels: loss differs by %.1e, gradient by %.1e from the stock kernels",
        parity.loss,
        parity.gradient,
    )
    return parity


def patch_layers(language_model: nn.Module) -> Callable[[], None]:
    """Put Liger's RMSNorm, SwiGLU and rotary embedding into the layers of one model.

    Args:
        language_model: A model of transformers, LoRA layers in place or not.

    Returns:
        What takes them out again.

    Raises:
        EnvironmentFailure: If liger-kernel is not installed, or the installed transformers has
            other layers than are known here.
        UserError: If the family is not supported.
    """
    config: Any = language_model.config
    kind = str(config.model_type)
    # A text model inside of a multimodal one may say "qwen2_text" and the like.
    family = _FAMILIES.get(kind.removesuffix("_text"))
    if family is None or config.hidden_act != "silu":
        raise UserError(
            f"key 'runtime.liger' is true, and language models of the type {kind!r} with "
            f"{config.hidden_act} are not supported (only {', '.join(_FAMILIES)} with silu).",
            _OFF,
        )
    makers = {
        f"{family}RMSNorm": _norm_forward,
        f"{family}MLP": _mlp_forward,
        f"{family}Attention": _attention_forward,
    }
    functions = _liger_functions()
    found: list[tuple[nn.Module, Forward]] = []
    missing = set(makers)
    for module in language_model.modules():
        name = type(module).__name__
        if name in makers:
            found.append((module, makers[name](module, functions)))
            missing.discard(name)
    if missing:
        raise EnvironmentFailure(
            f"the language model has no layer {min(missing)}, which Liger kernels go into.", _OFF
        )
    for module, forward in found:
        module.forward = forward

    def undo() -> None:
        for module, _ in found:
            # What the class says is seen again.
            del module.forward

    return undo


def require_parity(
    model: TuningModel, batch: Mapping[str, Tensor], patch: Callable[[], Callable[[], None]]
) -> Parity:
    """Compare loss and gradients before and after a patch, and take it back if they differ.

    Args:
        model: With its LoRA layers; its gradients are dropped.
        batch: As `TuningModel.forward` takes it.
        patch: Changes the model and returns what undoes it.

    Raises:
        EnvironmentFailure: If they differ by more than `BOUNDS`.
    """
    stock = _loss_and_gradients(model, batch)
    undo = patch()
    try:
        other = _loss_and_gradients(model, batch)
    except Exception:
        undo()
        raise
    parity = _compare(stock, other)
    bound = BOUNDS[model.autocast]
    if parity.worst > bound:
        undo()
        raise EnvironmentFailure(
            f"Liger kernels give another result than the stock ones: loss by {parity.loss:.1e}, "
            f"gradient by {parity.gradient:.1e}, and {bound:.0e} is allowed in "
            f"{str(model.autocast).removeprefix('torch.')}.",
            f"{_OFF} Or try another version of liger-kernel.",
        )
    return parity


@dataclass(frozen=True)
class _Functions:
    norm: Callable[..., Tensor]
    gate: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[..., tuple[Tensor, Tensor]]


def _liger_functions() -> _Functions:
    try:
        from liger_kernel.transformers.functional import (
            liger_rms_norm,
            liger_rope,
            liger_swiglu,
        )
    except ImportError as error:
        raise EnvironmentFailure(
            f"key 'runtime.liger' is true, and liger-kernel cannot be imported: {error}.",
            "Install it (pip install 'kuea-mllm[liger]'), or set runtime.liger=false.",
        ) from error
    return _Functions(liger_rms_norm, liger_swiglu, liger_rope)


def _norm_forward(norm: Any, functions: _Functions) -> Forward:
    def forward(hidden_states: Tensor) -> Tensor:
        # Not in place: the kernel would write into a gradient that others may read, too.
        return functions.norm(
            hidden_states,
            norm.weight,
            norm.variance_epsilon,
            offset=0.0,
            casting_mode="llama",
            in_place=False,
        )

    return forward


def _mlp_forward(mlp: Any, functions: _Functions) -> Forward:
    def forward(x: Tensor) -> Tensor:
        result: Tensor = mlp.down_proj(functions.gate(mlp.gate_proj(x), mlp.up_proj(x)))
        return result

    return forward


def _attention_forward(attention: Any, functions: _Functions) -> Forward:
    # The rotation is a function that the attention finds in its module; this attention finds ours.
    own = type(attention).forward
    if not isinstance(own, FunctionType) or _ROTATION not in own.__code__.co_names:
        raise EnvironmentFailure(
            f"{type(attention).__name__} of the installed transformers does not call {_ROTATION}.",
            _OFF,
        )
    seen = {**own.__globals__, _ROTATION: functions.rotate}
    copy = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return MethodType(copy, attention)


def _loss_and_gradients(
    model: TuningModel, batch: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    devices = [device] if (device := batch["input_ids"].device).type == "cuda" else []
    model.train()
    model.zero_grad(set_to_none=True)
    # The same dropout both times, and none of the numbers that the training will draw.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        loss = model(**batch)
        (loss / max(len(batch["targets"]), 1)).backward()
    # On the host: two of them beside the activations may be more than the device holds.
    found = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def _compare(
    stock: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]
) -> Parity:
    if stock[1].keys() != other[1].keys():
        return Parity(loss=math.inf, gradient=math.inf)
    size = sum(float(gradient.square().sum()) for gradient in stock[1].values())
    apart = sum(float((g - other[1][name]).square().sum()) for name, g in stock[1].items())
    return Parity(
        loss=abs(other[0] - stock[0]) / max(abs(stock[0]), 1e-12),
        gradient=math.sqrt(apart / max(size, 1e-24)),
    )
