"""The width of the tokens that a base's projector was made for, read off its weights (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kuea_mllm.errors import TowerMismatch
from kuea_mllm.model_files import INDEX_FILE, SINGLE_FILE, tensor_entries


@dataclass(frozen=True)
class ProjectorInput:
    """Which weight shows the width of a projector's input.

    Attributes:
        weight: End of the tensor's name: whole path components.
        axis: Axis of the weight along which the input lies.
        joined: Number of tower tokens (layers, neighbours) that are joined to one input.
    """

    weight: str
    axis: int
    joined: int = 1


def projector_width(base: Path, projector: ProjectorInput) -> int | None:
    """Return the width of one tower token that the projector in a model directory takes.

    Returns:
        The width; None if there are no weights, or no single tensor of that name.

    Raises:
        TowerMismatch: If the weight cannot take that number of joined tokens.
        UserError: If the weights are damaged.
    """
    base = Path(base)
    if not any((base / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return None
    entries = tensor_entries(base)
    ends = (projector.weight, f".{projector.weight}")
    found = [entry for name, entry in entries.items() if name == ends[0] or name.endswith(ends[1])]
    if len(found) != 1 or projector.axis >= len(found[0].shape):
        return None
    width, rest = divmod(found[0].shape[projector.axis], projector.joined)
    if rest:
        raise TowerMismatch(
            f"the projector in {base} takes {found[0].shape[projector.axis]} values "
            f"({found[0].name}), which are not {projector.joined} joined tokens, as config.json "
            "says.",
            "Configuration and weights do not belong together; restore the directory.",
        )
    return width
