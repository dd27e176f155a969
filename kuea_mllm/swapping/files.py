"""Where the tower's tensors lie in a model directory, and reading them one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.model_files import TensorEntry, tensor_entries
from kuea_mllm.towers.locate import expected_shapes, locate_tensors

MANIFEST_FILE = "kuea.json"


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


class FileState(Mapping[str, Tensor]):
    """Reads tensors from disk when they are asked for, one at a time."""

    def __init__(self, directory: Path, entries: Mapping[str, TensorEntry]) -> None:
        self._directory = directory
        self._entries = entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        with safe_open(self._directory / entry.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(entry.name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


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
