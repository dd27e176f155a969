"""One forward and backward pass of a tuning, counted on tensors without data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from kuea_mllm.adapters.base import MLLMTuner, TuningParts
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.config.lora import LoraConfig
from kuea_mllm.planning.counting import FusedKernels, PassCounts, count_pass
from kuea_mllm.planning.tuning_models import TunedModel
from kuea_mllm.planning.without_data import ImageTokens, UnpackedLinear, without_data
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.wrap import wrap_with_lora

# Layers are alike, so bytes and FLOPs are affine in their number; three are enough that the worst
# moments lie where they lie in a deep model.
_SHORT = 3

Only = Literal["flops", "bytes"]


@dataclass(frozen=True)
class PassSettings:
    """What one pass depends on, beside the model.

    Attributes:
        rows: Samples at once.
        tokens: Length of each.
        rank: Of the LoRA layers.
        targets: Last names of the layers that take LoRA; None for all.
        dropout: Whether LoRA layers drop out.
        trains_projector: Whether the projector trains.
        trains_head: Whether the output layer trains.
        chunk: Positions whose logits are held at once.
        checkpointing: Keep only the input of every layer and recompute the rest.
        quantised: Whether frozen weights are unpacked for every product.
        is_bf16: Whether the frozen weights and the arithmetic are bfloat16.
    """

    rows: int
    tokens: int
    rank: int
    targets: tuple[str, ...] | None
    dropout: bool
    trains_projector: bool
    trains_head: bool
    chunk: int
    checkpointing: bool
    quantised: bool
    is_bf16: bool


@lru_cache(maxsize=64)
def tuning_counts(
    model: TunedModel, settings: PassSettings, *, only: Only | None = None
) -> PassCounts:
    """Return what one pass takes; bytes hold neither parameters nor their gradients.

    Args:
        model: The model, LoRA layers not yet in place.
        settings: Of the pass.
        only: See `count_pass`.
    """
    layers = decoder_layers(model.build_empty(), model.parts)
    period = _period(layers)
    low = -(-_SHORT // period) * period
    high = low + period
    more, rest = divmod(len(layers) - low, period)
    if rest or more < 1:
        return _count(model, settings, len(layers), only)
    first, second = (_count(model, settings, depth, only) for depth in (low, high))
    return PassCounts(
        **{
            field.name: getattr(first, field.name)
            + more * (getattr(second, field.name) - getattr(first, field.name))
            for field in fields(PassCounts)
        }
    )


def count_tuning_pass(
    model: TuningModel, batch: Mapping[str, Tensor], *, only: Only | None = None
) -> PassCounts:
    """Count one pass of a model, on real or fake tensors.

    Args:
        model: From `prepare`.
        batch: What its forward takes.
        only: See `count_pass`.
    """
    # The model turns autocast on by itself.
    return count_pass(
        model, list(batch.values()), lambda: model(**batch), precision="fp32", only=only
    )


def prepare(
    model: nn.Module, tuner: MLLMTuner, parts: TuningParts, settings: PassSettings
) -> TuningModel:
    """Make of a model what a tuning trains, in place.

    Args:
        model: Loaded or empty.
        tuner: Of its adapter.
        parts: Where its parts are.
        settings: Of the pass.
    """
    dtype = torch.bfloat16 if settings.is_bf16 else torch.float32
    model.to(dtype)
    if settings.quantised:
        for path, layer in linear_targets(model, parts).items():
            model.set_submodule(path, UnpackedLinear(layer))
    config = LoraConfig(
        rank=settings.rank,
        dropout=0.5 if settings.dropout else 0.0,
        targets=None if settings.targets is None else list(settings.targets),
        projector="train" if settings.trains_projector else "freeze",
        train_lm_head=settings.trains_head,
    )
    wrapped = wrap_with_lora(model, parts, config, uses_autocast=settings.is_bf16)
    trained = TuningModel(wrapped, tuner, parts, chunk=settings.chunk, autocast=dtype).train()
    if settings.checkpointing:
        language: Any = trained.inner.get_submodule(parts.language_model)
        enable = getattr(language, "activation_checkpointing_enable", None)
        (enable or language.gradient_checkpointing_enable)(
            {"use_reentrant": False, "context_fn": _contexts}
        )
    return trained


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    # Function modes are off inside of a backward pass, where layers are computed again.
    return nullcontext(), FusedKernels()


def decoder_layers(model: nn.Module, parts: TuningParts) -> nn.ModuleList:
    """Return the list of a language model's layers: the longest in it."""
    lists = [
        module
        for module in model.get_submodule(parts.language_model).modules()
        if isinstance(module, nn.ModuleList)
    ]
    return max(lists, key=len)


def _count(
    model: TunedModel, settings: PassSettings, depth: int, only: Only | None = None
) -> PassCounts:
    empty = model.build_empty()
    del decoder_layers(empty, model.parts)[depth:]
    trained = prepare(empty, model.tuner, model.parts, settings)
    with FakeTensorMode():
        without_data(trained)
        side, positions = model.image_size, settings.rows * settings.tokens
        pixels = torch.empty(settings.rows, 3, side, side)
        batch = {
            "input_ids": torch.empty(settings.rows, settings.tokens, dtype=torch.long),
            # Every position predicts something: the most that a sample can ask for.
            "predicting": torch.empty(positions, dtype=torch.long),
            "targets": torch.empty(positions, dtype=torch.long),
        }
        try:
            with ImageTokens(settings.rows, model.tokens_per_image):
                return count_tuning_pass(trained, batch | {"pixel_values": pixels}, only=only)
        except (DataDependentOutputException, DynamicOutputShapeException):
            # More than the number of image tokens is read off them: text and image apart, then.
            return count_tuning_pass(trained, batch | {"idle_pixel_values": pixels}, only=only)


def _period(layers: nn.ModuleList) -> int:
    """Return after how many layers the sizes repeat."""
    sizes = [tuple(p.numel() for p in layer.parameters()) for layer in layers]
    return next(
        period
        for period in range(1, len(sizes) + 1)
        if all(size == sizes[at % period] for at, size in enumerate(sizes))
    )
