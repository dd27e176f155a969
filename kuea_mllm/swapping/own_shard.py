"""Give the tower a weight file of its own, so that later swaps write only that one.

A published LLaVA keeps its tower in a shard of 5 GB, together with the language model. Where the
file system cannot share blocks, every swap has to copy that shard. After this, the language model
lies in files that all later swaps link.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kuea_mllm.errors import UserError
from kuea_mllm.io import write_json
from kuea_mllm.model_files import INDEX_FILE, TensorEntry, tensor_entries, weight_files
from kuea_mllm.swapping.files import TowerPlace
from kuea_mllm.towers.files.model_copy import copy_file, files_of, take_over, try_link

_CHUNK = 16 << 20
_ALIGNMENT = 8


def write_own_shard(
    place: TowerPlace,
    new_state: Mapping[str, Tensor],
    partial: Path,
    *,
    link: bool = True,
    like: Path | None = None,
) -> tuple[TowerPlace, dict[str, tuple[str, ...]]]:
    """Copy a model directory with the tower in a file of its own, and other values in it.

    Names of tensors stay those of the base; names of files do not, since their number grows.

    Args:
        place: Where the tower is in the base.
        new_state: New values by canonical name, in the dtype on disk; a tensor that is not among
            them stays as it is.
        partial: Existing empty directory to fill.
        link: Whether files without tensors of the tower may be hard links.
        like: Another copy of the base that this function wrote, to link to instead of writing
            once more what both have in common.

    Returns:
        Where the tower is in the copy, and the files by what was done with them, keyed as in
        `SwapReceipt`.
    """
    base = place.directory
    entries = tensor_entries(base)
    tower = sorted(place.entries.items(), key=lambda item: (item[1].file, item[1].start))
    tower_files = {entry.file for _, entry in tower}
    kept = _other_tensors(entries, {entry.name for _, entry in tower})
    names = [f"model-{i:05}-of-{len(kept) + 1:05}.safetensors" for i in range(1, len(kept) + 2)]
    done: dict[str, list[str]] = {
        "rewritten": [names[-1]],
        "linked": [],
        "copied": [],
        "left_out": [],
    }
    weight_map = {entry.name: names[-1] for _, entry in tower}
    for name, (file, tensors) in zip(names, kept.items(), strict=False):
        source, target = (base / file).resolve(), partial / name
        weight_map |= {entry.name: name for entry in tensors}
        if file in tower_files and link and like is not None and try_link(like / name, target):
            done["linked"].append(name)
        elif file in tower_files:
            _write(target, tensors, _bytes_of(source, tensors))
            done["rewritten"].append(name)
        elif link and try_link(source, target):
            done["linked"].append(name)
        else:
            copy_file(source, target)
            done["copied"].append(name)
    stored = place.state()
    values = (new_state[key] if key in new_state else stored[key] for key, _ in tower)
    _write(partial / names[-1], [entry for _, entry in tower], map(_as_bytes, values))
    size = sum(entry.end - entry.start for entry in entries.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(partial / INDEX_FILE, index)
    replaced = {*weight_files(base), INDEX_FILE}
    for name, source in files_of(base):
        if name not in replaced:
            take_over(name, source, partial, done)
    files = {f"files_{what}": tuple(sorted(found)) for what, found in done.items()}
    moved = tensor_entries(partial)
    inside = {key: moved[entry.name] for key, entry in place.entries.items()}
    return replace(place, directory=partial, entries=inside), files


def has_own_shard(place: TowerPlace) -> bool:
    """Tell whether the files that hold the tower hold nothing else."""
    files = {entry.file for entry in place.entries.values()}
    others = {entry.name for entry in place.entries.values()}
    entries = tensor_entries(place.directory)
    return all(name in others for name, entry in entries.items() if entry.file in files)


def _other_tensors(
    entries: Mapping[str, TensorEntry], in_tower: set[str]
) -> dict[str, list[TensorEntry]]:
    """Return the tensors that are no part of the tower, in the order on disk, by file."""
    kept: dict[str, list[TensorEntry]] = {}
    for entry in sorted(entries.values(), key=lambda entry: (entry.file, entry.start)):
        if entry.name not in in_tower:
            kept.setdefault(entry.file, []).append(entry)
    return kept


def _write(path: Path, entries: Sequence[TensorEntry], contents: Iterator[memoryview]) -> None:
    """Write a safetensors file: names, dtypes and shapes of entries, then bytes in their order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.end - entry.start
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded with spaces, so that the tensors begin at an aligned address once mapped.
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        written = sum(stream.write(content) for content in contents)
    if written != end:
        raise UserError(f"a weight file of the base is damaged: {end - written} bytes are missing.")


def _bytes_of(file: Path, entries: Sequence[TensorEntry]) -> Iterator[memoryview]:
    with file.open("rb") as stream:
        for entry in entries:
            stream.seek(entry.start)
            left = entry.end - entry.start
            while left and (chunk := stream.read(min(_CHUNK, left))):
                yield memoryview(chunk)
                left -= len(chunk)


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
