"""What training or running one tower takes, from its configuration alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from kuea_mllm.errors import TowerError
from kuea_mllm.features import Features
from kuea_mllm.kernels import PolynomialKernel
from kuea_mllm.objectives import (
    Objective,
    PatchDistillTerm,
    PatchKernelTerm,
    PatchPreservationTerm,
    PatchTerm,
    Targets,
)
from kuea_mllm.planning.counting import (
    PassCounts,
    count_inference_flops,
    count_inference_peak,
    count_pass,
)
from kuea_mllm.planning.models import Architecture

# Blocks are alike, so bytes and FLOPs are affine in their number, and two short towers give the
# full one (tests/unit/test_planner.py compares). Not so with checkpointing: where the worst moment
# lies depends on the depth, so that is counted at full depth.
_SHORT = (3, 4)


@dataclass(frozen=True)
class PatchWork:
    """Patch terms of an objective, as far as they cost memory.

    Attributes:
        layer: Hidden state that is read.
        preserve: Whether the preservation term is on.
        kernel: Whether the kernel term is on.
        distill: Whether the distillation term is on.
        teachers: (patches, width) of each teacher's tokens.
    """

    layer: int
    preserve: bool
    kernel: bool
    distill: bool
    teachers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TowerSizes:
    """Shapes of one tower.

    Attributes:
        parameters: Number of weights.
        width: Width of the pooled embedding.
        token_width: Width of the patch tokens.
        patches: Patch tokens per image.
    """

    parameters: int
    width: int
    token_width: int
    patches: int


@lru_cache(maxsize=256)
def _sizes(config: str, has_projection: bool, image_size: int) -> TowerSizes:
    content = json.loads(config)
    model = build(content, has_projection=has_projection, device="meta")
    width = content["hidden_size"]
    return TowerSizes(
        parameters=sum(p.numel() for p in model.parameters()),
        width=content["projection_dim"] if has_projection else width,
        token_width=width,
        patches=(image_size // content["patch_size"]) ** 2,
    )


def tower_sizes(architecture: Architecture, image_size: int) -> TowerSizes:
    """Return the shapes of a tower run on images of `image_size` pixels."""
    return _sizes(architecture.key, architecture.has_projection, image_size)


@lru_cache(maxsize=256)
def _inference_flops(config: str, has_projection: bool, image_size: int) -> int:
    with FakeTensorMode():
        model = build(json.loads(config), has_projection=has_projection)
        pixels = torch.empty(1, 3, image_size, image_size)
        return count_inference_flops(lambda: model(pixel_values=pixels))


def inference_flops(architecture: Architecture, image_size: int) -> int:
    """Return the FLOPs of embedding one image."""
    return _inference_flops(architecture.key, architecture.has_projection, image_size)


@lru_cache(maxsize=256)
def _inference_peak(config: str, has_projection: bool, image_size: int, images: int) -> int:
    with FakeTensorMode():
        model = build(json.loads(config), has_projection=has_projection)
        pixels = torch.empty(images, 3, image_size, image_size)
        return count_inference_peak(model, pixels, lambda: model(pixel_values=pixels))


def inference_peak(architecture: Architecture, image_size: int, *, images: int) -> int:
    """Return the most bytes alive at once in embedding images, weights and pixels left out."""
    return _inference_peak(architecture.key, architecture.has_projection, image_size, images)


@lru_cache(maxsize=1024)
def _training(
    config: str,
    has_projection: bool,
    image_size: int,
    images: int,
    precision: str,
    checkpointing: bool,
    patches: PatchWork | None,
) -> PassCounts:
    content = json.loads(config)
    layers = content["num_hidden_layers"]

    def count(depth: int) -> PassCounts:
        with FakeTensorMode():
            short = content | {"num_hidden_layers": depth}
            model = build(short, has_projection=has_projection)
            return count_training(
                model,
                torch.empty(images, 3, image_size, image_size),
                precision=precision,
                checkpointing=checkpointing,
                patches=patches,
            )

    if checkpointing or layers <= _SHORT[1]:
        return count(layers)
    low, high = count(_SHORT[0]), count(_SHORT[1])
    more = (layers - _SHORT[0]) // (_SHORT[1] - _SHORT[0])
    values = {
        field.name: getattr(low, field.name)
        + more * (getattr(high, field.name) - getattr(low, field.name))
        for field in fields(PassCounts)
    }
    return PassCounts(**values)


def training_counts(
    architecture: Architecture,
    *,
    images: int,
    precision: str,
    checkpointing: bool = False,
    patches: PatchWork | None = None,
) -> PassCounts:
    """Return what forward and backward of a tower take; no weights, no memory.

    Args:
        architecture: The tower; it is run at its own image size.
        images: Images embedded at once.
        precision: "fp32", or "bf16" for autocast over float32 weights.
        checkpointing: Keep only the input of every block and recompute the rest.
        patches: Patch terms of the objective.
    """
    return _training(
        architecture.key,
        architecture.has_projection,
        architecture.image_size,
        images,
        precision,
        checkpointing,
        patches,
    )


def count_training(
    model: PreTrainedModel,
    pixels: Tensor,
    *,
    precision: str,
    checkpointing: bool = False,
    patches: PatchWork | None = None,
) -> PassCounts:
    """Count one forward and backward pass of a tower, on real or fake tensors.

    Args:
        model: Made by `build`; put into training mode.
        pixels: Normalised images, (n, 3, size, size).
        precision: See `training_counts`.
        checkpointing: See `training_counts`.
        patches: See `training_counts`.
    """
    model.train()
    if checkpointing:
        # The old name is deprecated since transformers 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    inputs = [pixels]
    trained: nn.Module = model
    targets, objective = None, None
    if patches is not None:
        objective, targets = _patch_objective(model, len(pixels), pixels.shape[-1], patches)
        inputs += [
            f.patches for f in (targets.original, *targets.teachers) if f.patches is not None
        ]
        trained = nn.ModuleList([model, objective])

    def loss() -> Tensor:
        output: Any = model(pixel_values=pixels, output_hidden_states=patches is not None)
        pooled = output.image_embeds if "image_embeds" in output else output.pooler_output
        total: Tensor = pooled.float().square().sum()
        if objective is not None and patches is not None and targets is not None:
            states = output.hidden_states
            tokens = states[max(min(patches.layer, len(states) - 1), -len(states))]
            count = (pixels.shape[-1] // model.config.patch_size) ** 2
            total = total + objective.patches(tokens[:, -count:], targets).total
        return total

    return count_pass(trained, inputs, loss, precision=precision)


def build(
    config: dict[str, Any], *, has_projection: bool, device: str | None = None
) -> PreTrainedModel:
    """Build a model of a configuration; its weights are not initialised.

    Args:
        config: Values of a Hugging Face vision configuration.
        has_projection: Whether a CLIP tower has its projection.
        device: "meta" to hold no memory; None for the default (fake under `FakeTensorMode`).

    Raises:
        TowerError: If transformers knows no such vision model.
    """
    try:
        made = AutoConfig.for_model(**config)
    except ValueError:
        raise TowerError(
            f"transformers knows no model type {config.get('model_type')!r}, so nothing can be "
            "counted."
        ) from None
    model_class: Any = MODEL_MAPPING.get(type(made), None)
    if config["model_type"] == "clip_vision_model":
        model_class = CLIPVisionModelWithProjection if has_projection else CLIPVisionModel
    if getattr(model_class, "main_input_name", "") != "pixel_values":
        raise TowerError(f"model type {config['model_type']!r} is no vision model.")
    with no_init_weights(), torch.device(device or "cpu"):
        model: PreTrainedModel = model_class._from_config(made, attn_implementation="sdpa")
    return model


def _patch_objective(
    model: PreTrainedModel, images: int, image_size: int, work: PatchWork
) -> tuple[Objective, Targets]:
    width = model.config.hidden_size
    count = (image_size // model.config.patch_size) ** 2
    terms: list[PatchTerm] = []
    if work.preserve:
        terms.append(PatchPreservationTerm(weight=1.0))
    if work.kernel:
        kernels = (PolynomialKernel(1.0, 1.0, trainable=True), PolynomialKernel(1.0, 1.0))
        terms.append(PatchKernelTerm(*kernels, weight=1.0))
    if work.distill:
        widths = [width, *(other for _, other in work.teachers)]
        terms.append(PatchDistillTerm(width, widths, weight=1.0))

    def tokens(number: int, size: int) -> Features:
        return Features(torch.empty(images, 1), torch.empty(images, number, size))

    targets = Targets(
        teachers=tuple(tokens(*shape) for shape in work.teachers), original=tokens(count, width)
    )
    return Objective(terms), targets
