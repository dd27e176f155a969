"""Data sets in clip-benchmark's webdataset layout: `SPLIT/nshards.txt`, `SPLIT/0.tar`, ..."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from kuea_mllm.data.tar import TarImages, read_texts
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
    texts = _texts_of_images(images, extension)
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


def _texts_of_images(images: TarImages, extension: str) -> list[str]:
    found = []
    for shard, names in images.member_names():
        texts = {_stem(name): (name, text) for name, text in read_texts(shard, extension)}
        for image in names:
            if (stem := _stem(image)) not in texts:
                raise DataError(
                    f"image {shard}!{os.fsdecode(image)} has no .{extension} member beside it.",
                    "The shard is incomplete: fetch it again.",
                )
            name, text = texts[stem]
            found.append(_decode(text, f"{shard}!{os.fsdecode(name)}"))
    return found


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: {error.reason}.", "Fetch the data set again."
        ) from error


def _stem(member: bytes) -> bytes:
    # webdataset's rule: the key ends at the first dot of the file name.
    folder, _, name = member.rpartition(b"/")
    return folder + b"/" + name.partition(b".")[0]


def _label(text: str, image: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"image {image}: its label {text!r} is no whole number.") from error
