"""Weight files of whole models, read and written one tensor at a time.

For models of many gigabytes, in both formats in circulation: safetensors, and the zip files of
`torch.save`, which are memory-mapped and never run as a pickle.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kuea_mllm.errors import UserError
from kuea_mllm.model_files import (
    INDEX_FILE,
    PICKLE_FILE,
    PICKLE_INDEX_FILE,
    SINGLE_FILE,
    TensorEntry,
    shard_of_tensors,
)
from kuea_mllm.towers.files.checkpoints import read_checkpoint_file

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is made when it is written.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        read: Makes it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def as_planned(tensor: Tensor) -> PlannedTensor:
    """Return a tensor that is written as it is."""
    return PlannedTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor.detach().cpu())


def loaded_shards(model_dir: Path) -> list[str]:
    """Return the weight files that transformers would load from a directory, in either format.

    Raises:
        UserError: If there are none, or one that the index lists is missing.
    """
    # In the order of transformers' `from_pretrained`.
    for single, index in ((SINGLE_FILE, INDEX_FILE), (PICKLE_FILE, PICKLE_INDEX_FILE)):
        if (model_dir / single).is_file():
            return [single]
        if (model_dir / index).is_file():
            return sorted(set(shard_of_tensors(model_dir / index).values()))
    raise UserError(
        f"{model_dir} holds no weights: none of {SINGLE_FILE}, {INDEX_FILE}, {PICKLE_FILE}, "
        f"{PICKLE_INDEX_FILE} is there.",
        "Give a complete model directory; if it is a download, run the download again.",
    )


def open_shard(path: Path) -> Mapping[str, Tensor]:
    """Open one weight file; its tensors are read from disk when they are used.

    Raises:
        UserError: If it is damaged, or not plain weights.
    """
    if path.suffix == ".safetensors":
        return _SafetensorsShard(path)
    content = read_checkpoint_file(path)
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"file {path}: {name} is a {type(value).__name__}, not a tensor.",
                "Give the directory as `save_pretrained` wrote it.",
            )
    return content


def write_safetensors(path: Path, tensors: Mapping[str, PlannedTensor]) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    Raises:
        UserError: If a dtype is none of float64, float32, float16, bfloat16.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise UserError(
                f"tensor {name} is {tensor.dtype}, which is quantised or no weight.",
                "Give the model in float32, float16 or bfloat16.",
            )
        start, end = end, end + tensor.size
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded with spaces, so that the tensors begin at an aligned address once mapped.
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name, planned in tensors.items():
            content = planned.read()
            if content.dtype != planned.dtype or tuple(content.shape) != planned.shape:
                raise ValueError(
                    f"{name} is {content.dtype} {tuple(content.shape)}, not as planned"
                )
            stream.write(content.contiguous().reshape(-1).view(torch.uint8).numpy().data)


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


class _SafetensorsShard(Mapping[str, Tensor]):
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                self._names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"file {path} is not a safetensors file or is cut short ({error}).",
                "Run the download or the conversion that made it again.",
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
