"""The tower's tensors in a model directory, and a copy of that directory with other ones.

Only the bytes of the tower's tensors change: a shard that holds some of them is copied and
overwritten in place, so that its header, every other tensor and the key names stay exactly those of
the base, and no other tensor passes through memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.adapters.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorEntry,
    is_weight_file,
    tensor_entries,
    weight_files,
)
from kuea_mllm.errors import TowerMismatch, UserError
from kuea_mllm.towers import keys

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
    """Find the tower's tensors under one of the key names that the slot allows.

    Raises:
        TowerMismatch: If there are none.
        UserError: If the weights are incomplete or damaged.
    """
    entries = tensor_entries(base)
    for prefix in slot.key_prefixes:
        found = {
            name.removeprefix(prefix): entry
            for name, entry in entries.items()
            if name.startswith(prefix) and not name.endswith(keys.IGNORED_SUFFIX)
        }
        # Told by its blocks, since a shorter prefix also matches names of a longer one.
        if any(name.startswith(keys.HF_BLOCK) for name in found):
            return TowerPlace(base, prefix, found)
    raise TowerMismatch(
        f"no vision tower was found in the weights of {base}: no tensor is named "
        f"{slot.key_prefixes[0]}{keys.HF_BLOCK}* or alike.",
        "The directory may hold only a part of the model, such as its language model.",
    )


def write_files(
    place: TowerPlace, new_state: Mapping[str, Tensor], partial: Path
) -> dict[str, tuple[str, ...]]:
    """Copy a model directory with other values for the tower's tensors.

    Args:
        place: Where the tower is.
        new_state: New values by canonical name, in the dtype on disk.
        partial: Existing empty directory to fill.

    Returns:
        The files by what was done with them, keyed as in `SwapReceipt`.
    """
    loaded = weight_files(place.directory)
    index_in_use = loaded != [SINGLE_FILE]
    rewritten = sorted({entry.file for entry in place.entries.values()})
    done: dict[str, list[str]] = {"linked": [], "copied": [], "left_out": []}
    for name, source in _files_of(place.directory):
        target = partial / name
        if name in rewritten:
            patches = {
                entry: new_state[key] for key, entry in place.entries.items() if entry.file == name
            }
            _rewrite_shard(source, target, patches)
        elif name in loaded:
            done["linked" if _link(source, target) else "copied"].append(name)
        elif is_weight_file(name) and not (name == INDEX_FILE and index_in_use):
            done["left_out"].append(name)
        elif name != MANIFEST_FILE:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            done["copied"].append(name)
    files = {f"files_{what}": tuple(names) for what, names in done.items()}
    return {"files_rewritten": tuple(rewritten), **files}


def _files_of(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative name, real file) of all files that are not hidden."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        # Hidden: version control and the download cache of huggingface_hub.
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            # A snapshot of the hub's cache holds symbolic links into its blobs.
            yield name.as_posix(), path.resolve()


def _rewrite_shard(source: Path, target: Path, patches: Mapping[TensorEntry, Tensor]) -> None:
    # A copy first, never a link: writing through a hard link would change the base.
    shutil.copyfile(source, target)
    with target.open("r+b") as stream:
        for entry, tensor in patches.items():
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            if content.nbytes != entry.end - entry.start:
                raise UserError(
                    f"file {source} is damaged: tensor {entry.name} takes "
                    f"{entry.end - entry.start} bytes, its shape and dtype {content.nbytes}."
                )
            stream.seek(entry.start)
            stream.write(content)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    # Another file system, or one without hard links.
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True
