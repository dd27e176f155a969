"""Reads Hugging Face model directories as files: which weights they load, where each tensor lies.

No torch and no tensor data, which `towers.files.checkpoints` reads. A safetensors file begins with
a JSON header that gives each tensor's dtype, shape and place
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_HEADER_LENGTH_BYTES = 8
_WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt"),
    *(".h5", ".msgpack", ".gguf", ".onnx"),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies on disk.

    Attributes:
        name: Full name in the file.
        file: Name of the file, relative to the model directory.
        dtype: Type as safetensors writes it ("F32", "F16", "BF16", ...).
        shape: Lengths of the axes.
        start: First byte, counted from the beginning of the file.
        end: Byte after the last.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(model_dir: Path) -> list[str]:
    """Return the names of the weight files that `from_pretrained` would load, in order.

    Raises:
        UserError: If there are none, a shard is missing, or only pickle files are there.
    """
    if (model_dir / SINGLE_FILE).is_file():
        # As in transformers: the single file wins over an index next to it.
        return [SINGLE_FILE]
    if (model_dir / INDEX_FILE).is_file():
        return sorted(set(shard_of_tensors(model_dir / INDEX_FILE).values()))
    pickles = sorted(path.name for path in model_dir.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{model_dir} holds its weights as pickle files ({pickles[0]}), which are not loaded.",
            "Convert it to safetensors first: load it with transformers and save_pretrained() it "
            "to a new directory.",
        )
    raise UserError(
        f"{model_dir} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there.",
        "Give a complete model directory; if it is a download, run the download again.",
    )


def is_weight_file(name: str) -> bool:
    """Say whether a file holds weights, or is the index of such files, by its name."""
    return Path(name.removesuffix(".index.json")).suffix in _WEIGHT_SUFFIXES


def tensor_entries(model_dir: Path) -> dict[str, TensorEntry]:
    """Return the place of every tensor of a model directory, by full name.

    Raises:
        UserError: If a weight file is missing, cut short or not a safetensors file.
    """
    entries: dict[str, TensorEntry] = {}
    for file in weight_files(model_dir):
        entries.update(_entries_of_file(model_dir, file))
    return entries


def check_complete(model_dir: Path) -> None:
    """Make sure that weights, tokenizer and image processor configuration are all there.

    Raises:
        UserError: Naming the first thing that is missing.
    """
    weight_files(model_dir)
    for what, names in (("tokenizer", _TOKENIZER_FILES), ("processor", _PROCESSOR_FILES)):
        if not any((model_dir / name).is_file() for name in names):
            raise UserError(
                f"{model_dir} has no {what}: none of {', '.join(names)} is there.",
                "Give a complete model directory; if it is a download, run the download again.",
            )


def shard_of_tensors(index: Path) -> dict[str, str]:
    """Read the index of a sharded model: which file each tensor is in, all files being there.

    Raises:
        UserError: If the index is damaged, or a shard is missing or no plain file name.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"file {index} has no weight_map.")
    for shard in sorted(set(weight_map.values())):
        # A name with a folder in it could point outside of the model directory.
        if Path(shard).name != shard:
            raise UserError(f"file {index} names the shard {shard!r}, which is no plain file name.")
        if not (index.parent / shard).is_file():
            raise UserError(
                f"shard {index.parent / shard} is missing, though {index.name} lists it.",
                "The directory is incomplete; run the download again.",
            )
    return weight_map


def image_settings(model_dir: Path) -> Mapping[str, Any]:
    """Return the image processor's settings of a model directory; empty if there are none.

    Raises:
        UserError: If a file is not a JSON object.
    """
    found = image_settings_file(model_dir)
    return {} if found is None else found[1]


def image_settings_file(model_dir: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the image processor's file and its settings, None if the directory has none.

    transformers 5 stores them inside `processor_config.json`, older releases in a file of their
    own; where both exist, the newer place wins as it does in transformers.

    Raises:
        UserError: If a file is not a JSON object.
    """
    for name in _PROCESSOR_FILES:
        path = model_dir / name
        if not path.is_file():
            continue
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"file {path} does not hold a JSON object.")
        settings = content.get("image_processor") if name == _PROCESSOR_FILES[0] else content
        if isinstance(settings, dict):
            return path, settings
    return None


def channel_values(
    settings: Mapping[str, Any], key: str, model_dir: Path
) -> tuple[float, ...] | None:
    """Return a per-channel setting ("image_mean", "image_std") as three numbers, or None.

    Raises:
        UserError: If the value is there but is not three numbers.
    """
    value = settings.get(key)
    if value is None:
        return None
    numbers = isinstance(value, list) and all(isinstance(number, int | float) for number in value)
    if not numbers or len(value) != 3:
        raise UserError(f"{model_dir}: {key} of the image processor is {value!r}, not 3 numbers.")
    return tuple(float(number) for number in value)


def _entries_of_file(model_dir: Path, file: str) -> dict[str, TensorEntry]:
    path = model_dir / file
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(_HEADER_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _HEADER_LENGTH_BYTES else size
        data_start = _HEADER_LENGTH_BYTES + length
        try:
            header = json.loads(stream.read(length)) if data_start <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise UserError(
            f"file {path} is not a safetensors file or is cut short.",
            "Run the download or the conversion that made it again.",
        )
    entries = {}
    for name, place in header.items():
        if name == "__metadata__":
            continue
        start, end = place["data_offsets"]
        entry = TensorEntry(
            name, file, place["dtype"], tuple(place["shape"]), data_start + start, data_start + end
        )
        if entry.end > size:
            raise UserError(
                f"file {path} is cut short: tensor {name} should end at byte {entry.end}, "
                f"the file has {size}.",
                "Run the download again.",
            )
        entries[name] = entry
    return entries
