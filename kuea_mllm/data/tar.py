"""Images in tar shards (webdataset's format) on a local disk, read by position."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from kuea_mllm.data.cache import cache_folder
from kuea_mllm.data.handles import FileReader
from kuea_mllm.data.source import Names, decode_image, unreadable
from kuea_mllm.data.tar_index import ShardIndex, index_shard, member_extension
from kuea_mllm.errors import DataError

# Reading headers waits for the disk or the network far more than for a core.
_INDEX_THREADS = 16
_BAR_FROM = 16


class TarImages:
    """All images in some tar files, in the order of the files.

    The files are never unpacked: their headers are read once (and kept in the cache folder, by
    path, size and time of change), then each image is one `pread`.

    Args:
        shards: Paths of uncompressed tar files.
        extension: Only members with this webdataset extension (all after the first dot of the
            name, such as "jpg" or "seg.png"); None takes every image.

    Raises:
        DataError: If a shard is missing, damaged or cut short, or none holds an image.
    """

    def __init__(self, shards: Sequence[str], *, extension: str | None = None) -> None:
        self.shards = list(shards)
        indexes = _index_all(self.shards)
        if extension is not None:
            indexes = [_only(index, extension.lstrip(".").lower()) for index in indexes]
        counts = np.array([len(index) for index in indexes], dtype=np.int64)
        if not counts.sum():
            wanted = "image" if extension is None else f"member with the extension {extension}"
            raise DataError(
                f"{len(shards)} tar shards, first {self.shards[0]}, hold no {wanted}.",
            )
        self._starts = np.concatenate([[0], np.cumsum(counts)])  # (shards + 1,)
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self._names = [index.names for index in indexes]
        self._files = FileReader()

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> Image.Image:
        """Decode one image completely."""
        size = int(self._sizes[index])
        shard, name = self._locate(index)
        try:
            data = self._files.read(shard, int(self._offsets[index]), size)
        except OSError as error:
            raise unreadable(name, str(error.strerror or error)) from error
        if len(data) < size:
            raise unreadable(name, f"the shard became shorter by {size - len(data)} bytes")
        return decode_image(data, name)

    def name(self, index: int) -> str:
        """Return `shard.tar!member`."""
        return self._locate(index)[1]

    def member_names(self) -> Iterator[tuple[str, Names]]:
        """Yield the path of each shard with the names of its images, in order."""
        return zip(self.shards, self._names, strict=True)

    def fingerprint(self) -> str:
        """Hash the names of shards (without their folder) and members, and all sizes."""
        digest = hashlib.sha256()
        for shard, names in self.member_names():
            digest.update(os.fsencode(os.path.basename(shard)) + b"\0")  # noqa: PTH119
            digest.update(names.ends.astype("<i8").tobytes() + names.text.tobytes())
        digest.update(self._sizes.astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"

    def _locate(self, index: int) -> tuple[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)} images")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard = self.shards[number]
        member = os.fsdecode(self._names[number][index - int(self._starts[number])])
        return shard, f"{shard}!{member}"


def _index_all(shards: Sequence[str]) -> list[ShardIndex]:
    folder = index_folder()
    with ThreadPool(_INDEX_THREADS) as pool:
        found = pool.imap(lambda path: index_shard(path, folder), shards)
        few = len(shards) < _BAR_FROM
        return list(tqdm(found, "index", len(shards), unit="shard", disable=few, leave=False))


def read_texts(shard: str, extension: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of the members of a shard that have an extension.

    Raises:
        DataError: If the shard is missing, damaged or cut short.
    """
    index = index_shard(shard, index_folder(), extension=extension)
    files = FileReader()
    for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
        try:
            content = files.read(shard, int(offset), int(size))
        except OSError as error:
            raise DataError(f"shard {shard} cannot be read: {error.strerror}.") from error
        yield name, content


def index_folder() -> Path:
    """Return the folder of the indexes of shards."""
    return cache_folder() / "tar_index"


def _only(index: ShardIndex, extension: str) -> ShardIndex:
    kept = [
        position for position, name in enumerate(index.names) if member_extension(name) == extension
    ]
    names = Names([index.names[position] for position in kept])
    return ShardIndex(names, index.offsets[kept], index.sizes[kept])
