"""Copies of model directories in which some tensors have other values.

Only the bytes of those tensors change: a shard that holds some of them is copied around them, so
that its header, every other tensor and the key names stay exactly those of the base, and no other
tensor passes through memory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kuea_mllm.errors import UserError
from kuea_mllm.model_files import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorEntry,
    is_weight_file,
    weight_files,
)

# Written anew for every copy.
RECORD_FILE = "kuea.json"

# ioctl_ficlone(2): share the blocks of a file, on file systems that can (btrfs, XFS).
_FICLONE = 0x40049409
_CHUNK = 16 << 20


def copy_model(
    base: Path,
    entries: Mapping[str, TensorEntry],
    new_state: Mapping[str, Tensor],
    partial: Path,
    *,
    link: bool = True,
) -> dict[str, tuple[str, ...]]:
    """Copy a model directory with other values for some of its tensors.

    Args:
        base: The directory; only read.
        entries: Places of tensors by the names of `new_state`.
        new_state: New values, in the dtype on disk; asked for one at a time. A tensor that is not
            among them stays as it is.
        partial: Existing empty directory to fill.
        link: Whether weight files without a changed tensor are hard links.

    Returns:
        Names of files by what was done with them: `files_rewritten`, `files_linked`,
        `files_copied`, `files_left_out`.
    """
    loaded = weight_files(base)
    index_in_use = loaded != [SINGLE_FILE]
    patches: dict[str, dict[TensorEntry, str]] = {}
    for key, entry in entries.items():
        if key in new_state:
            patches.setdefault(entry.file, {})[entry] = key
    done: dict[str, list[str]] = {"linked": [], "copied": [], "left_out": []}
    for name, source in files_of(base):
        target = partial / name
        if name in patches:
            rewrite_shard(source, target, patches[name], new_state)
        elif name in loaded:
            done["linked" if link and try_link(source, target) else "copied"].append(name)
            if not target.exists():
                copy_file(source, target)
        elif name == INDEX_FILE and index_in_use:
            shutil.copyfile(source, target)
            done["copied"].append(name)
        else:
            take_over(name, source, partial, done)
    files = {f"files_{what}": tuple(names) for what, names in done.items()}
    return {"files_rewritten": tuple(sorted(patches)), **files}


def take_over(name: str, source: Path, partial: Path, done: Mapping[str, list[str]]) -> None:
    """Copy a file that holds none of the weights that are loaded; leave out other weights.

    Args:
        name: Its name relative to the base.
        source: The file.
        partial: Directory to fill.
        done: Names of files by what was done with them: "copied" or "left_out" gets this one.
    """
    if is_weight_file(name):
        done["left_out"].append(name)
    elif name != RECORD_FILE:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial / name)
        done["copied"].append(name)


def files_of(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative name, real file) of all files that are not hidden."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        # Hidden: version control and the download cache of huggingface_hub.
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            # A snapshot of the hub's cache holds symbolic links into its blobs.
            yield name.as_posix(), path.resolve()


def rewrite_shard(
    source: Path, target: Path, patches: Mapping[TensorEntry, str], new_state: Mapping[str, Tensor]
) -> None:
    """Copy a safetensors file with other values for some of its tensors.

    Args:
        source: The base's file; only read.
        target: New file: never a link, since writing through one would change the base.
        patches: Place of each tensor -> its canonical name.
        new_state: Values by canonical name.

    Raises:
        UserError: If a place is not as long as its tensor, so that the file must be damaged.
    """
    ordered = sorted(patches, key=lambda entry: entry.start)
    with source.open("rb") as old, target.open("xb") as new:
        is_cloned = _clone(old, new)
        position = 0
        for entry in ordered:
            content = new_state[patches[entry]].contiguous().reshape(-1).view(torch.uint8)
            if content.numel() != entry.end - entry.start:
                raise UserError(
                    f"file {source} is damaged: tensor {entry.name} takes "
                    f"{entry.end - entry.start} bytes, its shape and dtype {content.numel()}."
                )
            if not is_cloned:
                _copy_range(old, new, position, entry.start)
            new.seek(entry.start)
            new.write(content.numpy().data)
            position = entry.end
        if not is_cloned:
            _copy_range(old, new, position, source.stat().st_size)


def copy_file(source: Path, target: Path) -> None:
    """Copy a large file, sharing its blocks where the file system can."""
    with source.open("rb") as old, target.open("xb") as new:
        if not _clone(old, new):
            _copy_range(old, new, 0, source.stat().st_size)


def try_link(source: Path, target: Path) -> bool:
    """Make a hard link; false on another file system, or one without hard links."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _clone(old: BinaryIO, new: BinaryIO) -> bool:
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
    # Most file systems cannot, each with an error number of its own.
    except OSError:
        return False
    return True


def _copy_range(old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    """Copy bytes `start` to `end` to the same place of another file."""
    old.seek(start)
    new.seek(start)
    while start < end:
        chunk = old.read(min(_CHUNK, end - start))
        if not chunk:
            raise UserError(f"file {old.name} became shorter while it was read.")
        new.write(chunk)
        start += len(chunk)
