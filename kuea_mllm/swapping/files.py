"""Where the tower's tensors lie in a model directory, and reading them one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.model_files import TensorEntry, tensor_entries
from kuea_mllm.towers.files.model_copy import RECORD_FILE
from kuea_mllm.towers.files.shards import FileState
from kuea_mllm.towers.formats.locate import expected_shapes, locate_tensors

MANIFEST_FILE = RECORD_FILE


@dataclass(frozen=True)
class TowerPlace:
    """Where the tower's tensors are in a model directory.

    Attributes:
        directory: The model directory.
        prefix: What stands before the canonical names on disk.
        entries: Canonical name -> place on disk.
    """

    directory: Path
    prefix: str
    entries: Mapping[str, TensorEntry]

    def state(self, directory: Path | None = None) -> FileState:
        """Return the tensors, read when asked for; from a copy of the directory if given."""
        return FileState(directory or self.directory, self.entries)


def locate_tower(base: Path, slot: TowerSlot) -> TowerPlace:
    """Find the tower's tensors by their names and shapes.

    Raises:
        TowerMismatch: If there are none, or they are not those that the slot describes.
        UserError: If the weights are incomplete or damaged.
    """
    prefix, found = locate_tensors(
        tensor_entries(base),
        expected_shapes(slot.family, slot.vision_config),
        module=slot.module,
        where=str(base),
    )
    return TowerPlace(base, prefix, found)
