"""Memory of one device in a tuning, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.planning.counting import PassCounts
from kuea_mllm.planning.memory import with_allowance
from kuea_mllm.planning.result import MemoryPart
from kuea_mllm.planning.tuning_models import TunedModel
from kuea_mllm.planning.tuning_pass import decoder_layers

# bitsandbytes: blocks that share a constant, and blocks of constants that share a second one.
_BLOCK, _OUTER_BLOCK = 64, 256
_MOMENT_BLOCK = 256
# Two tables for each layer: 256 float32 numbers and 16.
_TABLES_BYTES = 4 * (256 + 16)


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of a model by what happens to them.

    Attributes:
        linear: In linear layers of the language model, which can be quantised.
        linear_rows: Output rows of these layers.
        linear_layers: Number of these layers.
        rest: Of the language model beside them, with embeddings and output layer.
        head: Of the output layer alone.
        tower: Of the vision tower.
        other_encoders: Of encoders beside it.
        projector: Of the projector.
        layer: Of the largest decoder layer.
    """

    linear: int
    linear_rows: int
    linear_layers: int
    rest: int
    head: int
    tower: int
    other_encoders: int
    projector: int
    layer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.rest + self.tower + self.other_encoders + self.projector


@dataclass(frozen=True)
class Trained:
    """Parameters that train.

    Attributes:
        lora: In LoRA layers.
        lora_modules: Layers with LoRA.
        projector: Of the projector; 0 where it is frozen.
        head: Of the output layer; 0 where it is frozen.
    """

    lora: int
    lora_modules: int
    projector: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.lora + self.projector + self.head


@lru_cache(maxsize=32)
def model_sizes(model: TunedModel) -> ModelSizes:
    """Return the sizes of a model, counted on the meta device."""
    empty, parts = model.build_empty(), model.parts
    linear = linear_targets(empty, parts)
    tower = _count(empty.get_submodule(parts.vision_tower))
    others, projector = (
        sum(_count(empty.get_submodule(path)) for path in paths)
        for paths in (parts.other_encoders, parts.projector)
    )
    in_linear = sum(layer.weight.numel() for layer in linear.values())
    return ModelSizes(
        linear=in_linear,
        linear_rows=sum(layer.out_features for layer in linear.values()),
        linear_layers=len(linear),
        rest=_count(empty) - tower - others - projector - in_linear,
        head=_count(empty.get_submodule(parts.output_head)),
        tower=tower,
        other_encoders=others,
        projector=projector,
        layer=max(_count(layer) for layer in decoder_layers(empty, parts)),
    )


@lru_cache(maxsize=128)
def trained_sizes(
    model: TunedModel,
    *,
    rank: int,
    targets: tuple[str, ...] | None,
    trains_projector: bool,
    trains_head: bool,
) -> Trained:
    """Return what trains, as PEFT would make it."""
    sizes = model_sizes(model)
    found: list[Any] = list(linear_targets(model.build_empty(), model.parts, targets).values())
    return Trained(
        lora=sum(rank * (layer.in_features + layer.out_features) for layer in found),
        lora_modules=len(found),
        projector=sizes.projector if trains_projector else 0,
        head=sizes.head if trains_head else 0,
    )


def tuning_memory(
    recipe: LoraRecipe,
    sizes: ModelSizes,
    trained: Trained,
    counts: PassCounts,
    *,
    processes: int,
) -> tuple[MemoryPart, ...]:
    """Return the memory of one device at the worst moment of a step, part by part.

    Args:
        recipe: Resolved.
        sizes: Of its model.
        trained: What trains.
        counts: Of one pass at the longest length.
        processes: Devices.
    """
    wide = 2 if recipe.runtime.dtype == "bfloat16" else 4
    name = recipe.runtime.dtype
    # PEFT keeps the original beside what it trains as a whole.
    beside = wide * (sizes.projector + trained.head)
    parts = [
        *_frozen_linear(recipe, sizes, wide),
        MemoryPart("rest of the LM", wide * sizes.rest, f"embeddings, norms, output layer, {name}"),
        MemoryPart("vision tower", wide * sizes.tower, f"frozen, {name}"),
        *_other_encoders(sizes, wide, name),
        MemoryPart("originals", beside, f"projector as loaded, {name}; PEFT trains a copy"),
        MemoryPart("trained weights", 4 * trained.total, "LoRA and what else trains, float32"),
        MemoryPart("gradients", 4 * trained.total, "float32; the buckets of DDP are views of them"),
        moments(recipe.optim.optimizer, trained.total),
    ]
    if recipe.runtime.sharding == "fsdp":
        # Only the frozen layers are divided; what trains is whole in every process.
        whole = parts[0]
        reason = f"{whole.reason}; divided by {processes}"
        parts[0] = MemoryPart(whole.name, whole.bytes // processes, reason)
        gathered = wide * 2 * sizes.layer
        parts.append(MemoryPart("gathered weights", gathered, "two layers: one runs, one comes"))
    how = " (layer inputs only)" if recipe.runtime.gradient_checkpointing else ""
    worst = (
        "end of the forward pass, with autocast's copies of LoRA weights and a chunk's logits"
        if counts.forward_peak_bytes > counts.backward_peak_bytes
        else "backward pass of one layer, with its dropout masks and float32 copies"
    )
    parts += [
        MemoryPart("weight copies", counts.weight_copy_bytes, "kept by autocast for backward"),
        MemoryPart("activations", counts.activation_bytes, f"kept for backward, counted{how}"),
        MemoryPart("working space", counts.working_bytes, f"above that, counted: {worst}"),
    ]
    return with_allowance(parts)


def moments(optimizer: str, trained: int) -> MemoryPart:
    """Return what the moments of AdamW take on the device."""
    if optimizer.startswith("paged"):
        return MemoryPart("AdamW moments", 0, "paged: in the host's memory while there is no room")
    if optimizer == "adamw_8bit":
        return MemoryPart("AdamW moments", moment_bytes(optimizer, trained), "two, 8 bits each")
    return MemoryPart("AdamW moments", moment_bytes(optimizer, trained), "two float32 numbers each")


def moment_bytes(optimizer: str, trained: int) -> int:
    """Return what the moments take, wherever they are."""
    if optimizer.endswith("8bit"):
        return 2 * (trained + 4 * trained // _MOMENT_BLOCK)
    return 8 * trained


def _frozen_linear(recipe: LoraRecipe, sizes: ModelSizes, wide: int) -> list[MemoryPart]:
    kind, number = recipe.model.quantization, sizes.linear
    if kind == "none":
        reason = f"frozen linear layers, {recipe.runtime.dtype}"
        return [MemoryPart("language model", wide * number, reason)]
    if kind == "int8":
        return [
            MemoryPart("language model", number, "frozen linear layers, 8 bits"),
            MemoryPart("constants", 4 * sizes.linear_rows, "float32, one for each row"),
        ]
    blocks = number // _BLOCK
    constants = blocks + 4 * blocks // _OUTER_BLOCK + _TABLES_BYTES * sizes.linear_layers
    return [
        MemoryPart("language model", number // 2, "frozen linear layers, NF4"),
        MemoryPart("constants", constants, f"of NF4: 8 bits for {_BLOCK} weights, and of these"),
    ]


def _other_encoders(sizes: ModelSizes, wide: int, name: str) -> list[MemoryPart]:
    number = sizes.other_encoders
    return [MemoryPart("other encoders", wide * number, f"frozen, {name}")] if number else []


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
