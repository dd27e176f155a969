"""Packs: deterministic crops, stored once as pixels, read without decoding anything."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kuea_mllm.data.source import Names, unreadable
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import DataError
from kuea_mllm.io import read_json

PACK_FILE = "pack.json"
PACK_VERSION = 1
NAMES_FILE = "names.npz"
CHECKSUMS_FILE = "checksums.npy"


def shard_file(number: int) -> str:
    """Return the file name of one shard of pixels."""
    return f"pixels-{number:05}.npy"


class PackedImages:
    """The images of a pack.

    Args:
        folder: What `kuea-mllm pack` wrote.

    Raises:
        DataError: If it is no pack, unfinished, incomplete or from another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.record = _read_record(self.folder)
        self.image_size = int(self.record["image_size"])
        self._count = int(self.record["count"])
        self._per_shard = int(self.record["images_per_shard"])
        for number in range(-(-self._count // self._per_shard)):
            self._require_shard(number)
        try:
            self._checksums = np.load(self.folder / CHECKSUMS_FILE)
            with (self.folder / NAMES_FILE).open("rb") as file, np.load(file) as stored:
                self._names = Names.from_arrays(stored["text"], stored["ends"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"pack {folder} is damaged: {error}.", "Make it again.") from error
        if not len(self._checksums) == len(self._names) == self._count:
            raise DataError(f"pack {folder} is damaged: it does not name each image once.")
        self._reset()

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Image.Image:
        """Return the packed crop as a picture."""
        return Image.fromarray(np.ascontiguousarray(self.pixels(index).transpose(1, 2, 0)))

    def pixels(self, index: int) -> np.ndarray:
        """Return a copy of one crop, uint8, (3, size, size).

        Raises:
            UnreadableImage: If the disk no longer holds what was written.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"position {index} of {self._count} images")
        pixels = np.array(self._shard(index // self._per_shard)[index % self._per_shard])
        if zlib.crc32(pixels.data) != int(self._checksums[index]):
            raise unreadable(self.name(index), f"its pixels in {self.folder} have changed")
        return pixels

    def name(self, index: int) -> str:
        """Return the name that the image had in the packed source."""
        return os.fsdecode(self._names[index])

    def fingerprint(self) -> str:
        """Return the fingerprint of the packed pixels: source, transform and what was left out."""
        return str(self.record["fingerprint"])

    def require_transform(self, transform: ImageTransform) -> None:
        """Check that the pixels were made by this transform.

        Raises:
            DataError: If they were not.
        """
        if self.record["transform"] != transform.fingerprint:
            raise DataError(
                f"pack {self.folder} holds crops of {self.record['transform']}, the tower needs "
                f"{transform.fingerprint}.",
                f"Make another: kuea-mllm pack --images {self.record['source']} --size "
                f"{transform.image_size} --resize {transform.resize} --out DIR.",
            )

    def _require_shard(self, number: int) -> None:
        path = self.folder / shard_file(number)
        rows = min(self._per_shard, self._count - number * self._per_shard)
        expected = (rows, 3, self.image_size, self.image_size)
        try:
            shard = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"pack {self.folder} is incomplete: {path.name}: {error}.", "Copy it again."
            ) from error
        if shard.shape != expected or shard.dtype != np.uint8:
            raise DataError(
                f"pack {self.folder} is damaged: {path.name} has the shape {shard.shape}, "
                f"expected {expected}."
            )

    def _shard(self, number: int) -> np.ndarray:
        with self._lock:
            shard = self._shards.get(number)
            if shard is None:
                path = self.folder / shard_file(number)
                shard = self._shards[number] = np.load(path, mmap_mode="r")
            return shard

    def _reset(self) -> None:
        # A memory map has no position, so forked workers may share it.
        self._shards: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        left = {"_shards", "_lock"}
        return {key: value for key, value in self.__dict__.items() if key not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def is_pack(folder: Path) -> bool:
    """Whether a folder is a finished pack."""
    return (folder / PACK_FILE).is_file()


def _read_record(folder: Path) -> Mapping[str, Any]:
    if not is_pack(folder):
        raise DataError(
            f"{folder} is not a finished pack: {PACK_FILE} is missing.",
            "If it was interrupted, run the same `kuea-mllm pack` command again to finish it.",
        )
    record = read_json(folder / PACK_FILE)
    if not isinstance(record, dict) or record.get("schema_version") != PACK_VERSION:
        found = record.get("schema_version") if isinstance(record, dict) else record
        raise DataError(
            f"pack {folder} has schema_version {found}, this version reads {PACK_VERSION}.",
            "Make it again with `kuea-mllm pack`.",
        )
    keys = {"count", "image_size", "images_per_shard", "transform", "source", "fingerprint"}
    missing = sorted(keys - set(record))
    if missing:
        raise DataError(f"pack {folder}: {PACK_FILE} lacks {', '.join(missing)}.")
    return record
