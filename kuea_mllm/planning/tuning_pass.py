"""One forward and backward pass of a model with LoRA layers, counted on tensors without data.

It is the pass of `kuea_mllm.tuning`: tests/unit/planning/test_tuning_counts.py compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from kuea_mllm.adapters.base import MLLMTuner, TuningParts
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.planning.counting import FusedKernels, PassCounts, count_pass
from kuea_mllm.planning.tuning_models import TunedModel

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
    model: nn.Module,
    tuner: MLLMTuner,
    parts: TuningParts,
    batch: Mapping[str, Tensor],
    settings: PassSettings,
    only: Only | None = None,
) -> PassCounts:
    """Count one pass of a model, on real or fake tensors.

    Args:
        model: From `prepare`.
        tuner: Of its adapter.
        parts: Where its parts are.
        batch: What `MLLMTuner.hidden_states` takes; and `idle_pixel_values`, images of which only
            the features are computed.
        settings: Of the pass.
        only: See `count_pass`.
    """
    head: Any = model.get_submodule(parts.output_head)
    # Every position predicts something: the most that a sample can ask for.
    targets = torch.zeros(settings.rows * settings.tokens, dtype=torch.long)
    inputs = {name: value for name, value in batch.items() if name != "idle_pixel_values"}

    def loss() -> Tensor:
        total = torch.zeros(())
        if (idle := batch.get("idle_pixel_values")) is not None:
            total = total + 0.0 * tuner.image_features(model, idle).float().sum()
        hidden = tuner.hidden_states(model, inputs).flatten(0, 1)[torch.arange(len(targets))]
        weight = head.weight[: parts.vocabulary_size]
        for start in range(0, len(targets), settings.chunk):
            rows = slice(start, start + settings.chunk)
            total = total + checkpoint(
                _cross_entropy,
                hidden[rows],
                weight,
                targets[rows],
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total

    precision = "bf16" if settings.is_bf16 else "fp32"
    return count_pass(model, [*batch.values(), targets], loss, precision=precision, only=only)


def prepare(model: nn.Module, parts: TuningParts, settings: PassSettings) -> None:
    """Freeze a model, put LoRA layers in and set what trains, all in place."""
    model.to(torch.bfloat16 if settings.is_bf16 else torch.float32).requires_grad_(False)
    found = linear_targets(model, parts, settings.targets)
    if settings.quantised:
        for path, layer in linear_targets(model, parts).items():
            model.set_submodule(path, UnpackedLinear(layer))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_dropout=0.5 if settings.dropout else 0.0,
        target_modules=list(found),
    )
    peft.inject_adapter_in_model(config, model)
    whole = [*(parts.projector if settings.trains_projector else ())]
    whole += [parts.output_head] if settings.trains_head else []
    for path in whole:
        model.get_submodule(path).requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    if settings.checkpointing:
        language: Any = model.get_submodule(parts.language_model)
        enable = getattr(language, "activation_checkpointing_enable", None)
        (enable or language.gradient_checkpointing_enable)(
            {"use_reentrant": False, "context_fn": _contexts}
        )


class UnpackedLinear(nn.Linear):
    """A frozen layer whose weights are unpacked for every product, as bitsandbytes does it."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer; keeps nothing for the backward pass."""
        product: Any = _Unpacked.apply(input.to(self.weight.dtype), self.weight)
        output: Tensor = product if self.bias is None else product + self.bias
        return output


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return functional.linear(input, torch.empty_like(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ torch.empty_like(ctx.weight), None


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
    prepare(empty, model.parts, settings)
    with FakeTensorMode():
        _without_data(empty)
        side = model.image_size
        pixels = torch.empty(settings.rows, 3, side, side)
        ids = torch.empty(settings.rows, settings.tokens, dtype=torch.long)
        count = partial(
            count_tuning_pass, empty, model.tuner, model.parts, settings=settings, only=only
        )
        try:
            with ImageTokens(settings.rows, model.tokens_per_image):
                return count({"input_ids": ids, "pixel_values": pixels})
        except (DataDependentOutputException, DynamicOutputShapeException):
            # More than the number of image tokens is read off them: text and image apart, then.
            return count({"input_ids": ids, "idle_pixel_values": pixels})


class ImageTokens(TorchFunctionMode):
    """Answer how many image tokens there are, which tensors without data cannot.

    Args:
        rows: Rows of the batch.
        each: Image tokens in each of them.
    """

    def __init__(self, rows: int, each: int) -> None:
        super().__init__()
        self._rows, self._each = rows, each

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace reading a total, and the number of a row."""
        if func is Tensor.__int__:
            return self._rows * self._each
        if func is Tensor.item:  # `tolist` of a tensor without data comes down to it
            return self._each
        return func(*args, **(kwargs or {}))


def _without_data(model: nn.Module) -> None:
    """Replace meta tensors by fake ones, which autocast and fused attention know."""
    made: dict[int, nn.Parameter] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in made:
                empty = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _period(layers: nn.ModuleList) -> int:
    """Return after how many layers the sizes repeat."""
    sizes = [tuple(p.numel() for p in layer.parameters()) for layer in layers]
    return next(
        period
        for period in range(1, len(sizes) + 1)
        if all(size == sizes[at % period] for at, size in enumerate(sizes))
    )


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, targets, reduction="sum")
