"""Data sets in clip-benchmark's webdataset layout: `SPLIT/nshards.txt`, `SPLIT/0.tar`, ..."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kuea_mllm.data.tar import TarImages
from kuea_mllm.errors import DataError
from kuea_mllm.probing.datasets.classes import (
    CLASS_NAMES_FILE,
    TEMPLATES_FILE,
    read_class_names,
    read_templates,
)
from kuea_mllm.probing.datasets.dataset import ProbeDataset

SHARDS_FILE, TYPE_FILE = "nshards.txt", "dataset_type.txt"


def is_wds(folder: Path, split: str) -> bool:
    """Tell whether a folder holds a split in this layout."""
    return (folder / split / SHARDS_FILE).is_file()


def open_wds(folder: Path, split: str, *, name: str) -> ProbeDataset:
    """Open a split; shards are read by position and never unpacked.

    Args:
        folder: Folder of the data set.
        split: Which split.
        name: Heading of its columns.

    Raises:
        DataError: If a shard is missing or damaged, or an image has neither label nor captions.
    """
    shards = list_wds_shards(folder, split)
    images = TarImages(shards)
    kind_file = folder / TYPE_FILE
    kind = kind_file.read_text().strip().lower() if kind_file.is_file() else "classification"
    if kind not in {"classification", "retrieval"}:
        raise DataError(
            f"{kind_file} says {kind!r}; only classification and retrieval are known.",
        )
    extension = "txt" if kind == "retrieval" else "cls"
    texts = _texts_of_images(images, shards, extension)
    if kind == "retrieval":
        captions = tuple(tuple(text.splitlines()) for text in texts)
        return ProbeDataset(name, split, images, str(folder), captions=captions)
    names, templates = folder / CLASS_NAMES_FILE, folder / TEMPLATES_FILE
    return ProbeDataset(
        name,
        split,
        images,
        str(folder),
        labels=np.array([_label(t, images.name(i)) for i, t in enumerate(texts)], dtype=np.int64),
        class_names=read_class_names(names) if names.is_file() else (),
        templates=read_templates(templates) if templates.is_file() else (),
    )


def list_wds_shards(folder: Path, split: str) -> list[str]:
    """Return the shards of a split in the order of their numbers.

    Raises:
        DataError: If nshards.txt is no number, or a shard is missing.
    """
    path = folder / split / SHARDS_FILE
    try:
        count = int(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"data set {folder} has no {split}/{SHARDS_FILE}.") from error
    except ValueError as error:
        raise DataError(f"{path} does not hold the number of shards.") from error
    shards = [folder / split / f"{number}.tar" for number in range(count)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise DataError(
            f"{path} says {count} shards, and {missing[0] if missing else 'none'} is not there "
            f"({len(missing)} are missing).",
            "Fetch the data set again.",
        )
    return [str(shard) for shard in shards]


def _texts_of_images(images: TarImages, shards: Sequence[str], extension: str) -> list[str]:
    texts = dict(_members(shards, extension))
    found = []
    for index in range(len(images)):
        shard, _, member = images.name(index).partition(".tar!")
        key = f"{shard}.tar!{_stem(member)}"
        if key not in texts:
            raise DataError(
                f"image {images.name(index)} has no .{extension} member beside it.",
                "The shard is incomplete: fetch it again.",
            )
        found.append(texts[key])
    return found


def _members(shards: Sequence[str], extension: str) -> Iterator[tuple[str, str]]:
    for shard in shards:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile() and _extension(member.name) == extension:
                    content = archive.extractfile(member)
                    data = b"" if content is None else content.read()
                    yield f"{shard}!{_stem(member.name)}", _decode(data, f"{shard}!{member.name}")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: {error.reason}.", "Fetch the data set again."
        ) from error


def _stem(member: str) -> str:
    # webdataset's rule: the key ends at the first dot of the file name.
    folder, _, name = member.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _extension(member: str) -> str:
    return os.path.basename(member).partition(".")[2].lower()  # noqa: PTH119 - of a tar member


def _label(text: str, image: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"image {image}: its label {text!r} is no whole number.") from error
