"""Rows of embeddings on disk: appended a shard at a time, checked when they are opened."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kuea_mllm.data.cache import mark_used
from kuea_mllm.errors import DataError
from kuea_mllm.io import disk_errors_named, read_json, write_json
from kuea_mllm.manifest import library_versions, utc_now

SCHEMA_VERSION = 1
PREFIX = "features-"
Dtype = Literal["float32", "bfloat16", "float16"]
Features = NDArray[np.float32]
ROWS_FILE, CHECKSUMS_FILE, RECORD_FILE = "embeddings.npy", "checksums.npy", "features.json"

_REMEDY = (
    "Free some space and run the command again: it goes on where it stopped. Or choose another "
    "place with $KUEA_MLLM_CACHE."
)


@dataclass(frozen=True)
class FeatureKey:
    """Everything that the rows of a store depend on.

    Attributes:
        images: Fingerprint of the listing.
        count: Number of images in it.
        pixels: Fingerprint of the way from a picture to pixels.
        embedder: Fingerprint of the model.
        dtype: What it computes in.
        width: Numbers in one embedding.
    """

    images: str
    count: int
    pixels: str
    embedder: str
    dtype: Dtype
    width: int

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any part of the key."""
        content = json.dumps([SCHEMA_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class FeatureFiles:
    """The files of a store while it grows; `features.json` says how many rows are whole.

    Args:
        directory: The store.
        key: What its rows depend on.
        description: The model, in words.
        first_image: Name of the first image, by which people know the data set.
    """

    def __init__(
        self, directory: Path, key: FeatureKey, description: str, first_image: str = ""
    ) -> None:
        self.directory, self.key = directory, key
        self._description, self._first_image = description, first_image
        self.shards: list[list[int]] = []  # [rows, crc32 of their bytes] of each shard
        self._created = utc_now()

    @property
    def rows(self) -> int:
        """Rows that are whole and on disk."""
        return sum(rows for rows, _ in self.shards)

    def open(self) -> None:
        """Read what is there, checked; or make empty files.

        Raises:
            DataError: If what is there is damaged, or of another key.
            EnvironmentFailure: If the disk is full.
        """
        path = self.directory / RECORD_FILE
        if not path.exists():
            with self._disk():
                for name, shape, dtype in self._layout():
                    np.lib.format.open_memmap(
                        self.directory / name, mode="w+", dtype=dtype, shape=shape
                    )
                self._save()
            return
        content = read_json(path)
        if content.get("key") != asdict(self.key):
            raise self._damaged("the key in features.json is not the one it is named by")
        self.shards = [[int(rows), int(crc)] for rows, crc in content["shards"]]
        self._created = str(content["created"])
        self._verify({name: self._map(name, shape, d) for name, shape, d in self._layout()})
        mark_used(path)

    def _map(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(self.directory / name, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise self._damaged(f"{name} is truncated, missing or no .npy file") from error
        if array.shape != shape or array.dtype != dtype:
            raise self._damaged(f"{name} has another shape or type than its key says")
        return array

    def _verify(self, mapped: dict[str, NDArray[Any]]) -> None:
        first = 0
        for rows, crc in self.shards:
            last = first + rows
            if zlib.crc32(np.ascontiguousarray(mapped[ROWS_FILE][first:last]).data) != crc:
                raise self._damaged(f"rows {first} to {last - 1} are not what was written")
            first = last

    def append(self, rows: Features, checksums: NDArray[np.uint32]) -> None:
        """Write one shard; it counts only when it is on disk."""
        first = self.rows
        with self._disk():
            for name, values in ((ROWS_FILE, rows), (CHECKSUMS_FILE, checksums)):
                self._write(name, first, values)
            self.shards.append([len(rows), zlib.crc32(rows.data)])
            self._save()

    def pixel_checksum(self, position: int) -> int:
        """Return the crc32 of the pixels that a row was computed from."""
        return int(np.load(self.directory / CHECKSUMS_FILE, mmap_mode="r")[position])

    def _write(self, name: str, first: int, values: NDArray[Any]) -> None:
        # Written and not stored through the map: a full disk is then an error, no SIGBUS.
        path = self.directory / name
        offset = int(np.load(path, mmap_mode="r").offset) + first * (values.nbytes // len(values))
        data = np.ascontiguousarray(values).data.cast("B")
        descriptor = os.open(path, os.O_RDWR)
        try:
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _layout(self) -> list[tuple[str, tuple[int, ...], np.dtype[Any]]]:
        count = self.key.count
        return [
            (ROWS_FILE, (count, self.key.width), np.dtype("<f4")),
            (CHECKSUMS_FILE, (count,), np.dtype("<u4")),
        ]

    def _save(self) -> None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "kind": "features",
            "embedder": self._description,
            "first_image": self._first_image,
            "key": asdict(self.key),
            "shards": self.shards,
            "created": self._created,
            "versions": library_versions(),
        }
        write_json(self.directory / RECORD_FILE, content)

    def _disk(self) -> Any:
        return disk_errors_named(self.directory, remedy=_REMEDY)

    def _damaged(self, problem: str) -> DataError:
        return damaged_store(self.directory, problem)


def damaged_store(directory: Path, problem: str) -> DataError:
    """Return the error for a store that cannot be used."""
    return DataError(
        f"cache {directory} cannot be used: {problem}.",
        f"Remove the directory (`kuea-mllm cache rm {directory.name.removeprefix(PREFIX)}`); it is "
        "built again when it is needed.",
    )
