"""What trains and what does not, by group, and the proof that the tower does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.errors import KueaError

_LORA_MARK, _KEPT = "lora_", "original_module"


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that train, or do not, together.

    Attributes:
        name: What they are.
        modules: Number of layers they belong to.
        tensors: Their number.
        parameters: Numbers in them.
        dtypes: Their dtypes.
        trains: Whether they do.
    """

    name: str
    modules: int
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    trains: bool


@dataclass(frozen=True)
class TrainingReceipt:
    """All tensors of a model that is to be tuned.

    Attributes:
        groups: Those that train first.
    """

    groups: tuple[TensorGroup, ...]

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return sum(group.parameters for group in self.groups if group.trains)

    def count(self, name: str) -> int:
        """Return the numbers of one group; 0 if there is none."""
        return sum(group.parameters for group in self.groups if group.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"trainable": self.trainable, "groups": [asdict(group) for group in self.groups]}

    def lines(self) -> Iterator[str]:
        """Describe each group in a line, for the log."""
        for group in self.groups:
            yield (
                f"{'trained' if group.trains else 'frozen '}  {group.name}: "
                f"{group.parameters:,} parameters in {group.tensors} tensors of {group.modules} "
                f"layers ({', '.join(group.dtypes)})"
            )


class LeakedTraining(KueaError):
    """Something trains that must not; a fault of this program or of a library."""


def make_receipt(inner: nn.Module, parts: TuningParts, *, head_trains: bool) -> TrainingReceipt:
    """Count what trains, and make sure that it is only what should.

    Args:
        inner: The adapter's model, LoRA layers in place.
        parts: Where its parts are.
        head_trains: Whether the output layer was asked to train.

    Raises:
        LeakedTraining: If a tensor of the tower trains or a layer of it has LoRA, or if something
            trains that belongs to no group.
    """
    found: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        group = _group_of(name, parts)
        trains = parameter.requires_grad
        is_leak = trains and (
            group == "vision tower"
            or (group == "output layer" and not head_trains)
            or group in ("language model", "other")
        )
        if is_leak or (group == "vision tower" and _LORA_MARK in name):
            raise LeakedTraining(
                f"tensor {name} would train, and it belongs to the {group}.",
                "Nothing was trained. Report this with the model's config.json.",
            )
        found.setdefault((group, trains), []).append((name, parameter))
    groups = [_describe(name, trains, found[name, trains]) for name, trains in found]
    return TrainingReceipt(tuple(sorted(groups, key=lambda group: (not group.trains, group.name))))


def _group_of(name: str, parts: TuningParts) -> str:
    group = _place_of(name, parts)
    # PEFT keeps what a module was before, beside the copy of it that trains.
    return f"{group} of the base, not used" if f".{_KEPT}." in name else group


def _place_of(name: str, parts: TuningParts) -> str:
    # The tower first: whatever lies in it belongs to it, LoRA layers above all.
    if name.startswith(f"{parts.vision_tower}."):
        return "vision tower"
    if any(name.startswith(f"{module}.") for module in parts.projector):
        return "projector"
    if name.startswith(f"{parts.output_head}."):
        return "output layer"
    if name.startswith(f"{parts.language_model}."):
        return "LoRA" if _LORA_MARK in name else "language model"
    return "other"


def _describe(name: str, trains: bool, members: list[tuple[str, nn.Parameter]]) -> TensorGroup:
    # One LoRA layer has two matrices, a linear layer weight and bias.
    cut = f".{_LORA_MARK}" if name == "LoRA" else "."
    layers = {
        path.partition(cut)[0] if name == "LoRA" else path.rpartition(cut)[0] for path, _ in members
    }
    return TensorGroup(
        name=name,
        modules=len(layers),
        tensors=len(members),
        parameters=sum(_count(parameter) for _, parameter in members),
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for _, p in members})),
        trains=trains,
    )


def _count(parameter: Any) -> int:
    # Four-bit weights are stored two in a byte; bitsandbytes keeps the shape they stand for.
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())
