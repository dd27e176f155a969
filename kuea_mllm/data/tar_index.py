"""Where the images (or other members) lie in a tar file, found by reading its headers only."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kuea_mllm.data.source import Names, has_image_suffix
from kuea_mllm.data.tar_format import COMPRESSED, Member, walk
from kuea_mllm.errors import DataError
from kuea_mllm.log import LOGGER

_INDEX_VERSION = 1


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard, or its members of one extension, in file order."""

    names: Names
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)


def index_shard(path: str, cache: Path | None, *, extension: str | None = None) -> ShardIndex:
    """Return the images of a shard, from the cache if the file is the one indexed before.

    Args:
        path: The tar file.
        cache: Folder of indexes; None always reads the headers.
        extension: Return the members with this webdataset extension ("cls") instead of the images.

    Raises:
        DataError: If the file is missing, compressed, damaged or cut short; names the place.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise DataError(f"shard {path} cannot be opened: {error.strerror}.") from error
    sidecar = None
    if cache is not None:
        key = f"{_INDEX_VERSION}\0{os.path.realpath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
        if extension is not None:
            key += f"\0{extension}"
        sidecar = cache / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:40]}.npz"
        known = _load(sidecar)
        if known is not None:
            return known
    members = [
        member
        for member in read_members(path)
        if (
            is_image_member(member.name)
            if extension is None
            else member_extension(member.name) == extension
        )
    ]
    index = ShardIndex(
        names=Names([member.name for member in members]),
        offsets=np.array([member.offset for member in members], dtype=np.int64),
        sizes=np.array([member.size for member in members], dtype=np.int64),
    )
    if sidecar is not None:
        _save(sidecar, index)
    return index


def read_members(path: str) -> Iterator[Member]:
    """Yield the regular files of a tar file without reading their content.

    Raises:
        DataError: If the file is not a complete, uncompressed tar file; names the byte position
            and the last member that is whole.
    """
    try:
        with Path(path).open("rb", buffering=0) as file:
            yield from walk(path, _Positioned(path, file.fileno()))
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}.") from error


class _Positioned:
    """A local file as `walk` reads it: whatever is skipped is not read at all."""

    def __init__(self, path: str, number: int) -> None:
        self.path = path
        self.number = number
        self.length = os.fstat(number).st_size
        self.position = 0

    def take(self, size: int) -> bytes:
        data = os.pread(self.number, size, self.position)
        if self.position == 0 and data.startswith(COMPRESSED):
            raise DataError(
                f"shard {self.path} is compressed, so its images cannot be read by position.",
                "Decompress it, or read it front to back with data.stream=true.",
            )
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        """Return how many bytes there were to skip."""
        size = min(size, self.length - self.position)
        self.position += size
        return size


def member_extension(name: bytes) -> str:
    """Return webdataset's extension: all after the first dot of the file name, in lower case."""
    return os.fsdecode(os.path.basename(name)).partition(".")[2].lower()  # noqa: PTH119


def is_image_member(name: bytes) -> bool:
    """Whether a member is an image that was put there on purpose."""
    base = os.path.basename(name)  # noqa: PTH119
    # Hidden files are what macOS adds to every file of an archive ("._0001.jpg").
    return not base.startswith(b".") and has_image_suffix(os.fsdecode(base))


def _load(sidecar: Path) -> ShardIndex | None:
    try:
        # Opened here: numpy leaves a damaged file open.
        with sidecar.open("rb") as file, np.load(file) as stored:
            names = Names.from_arrays(stored["text"], stored["ends"])
            return ShardIndex(names, stored["offsets"], stored["sizes"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        LOGGER.warning("index %s is damaged (%s): reading the shard again", sidecar, error)
        return None


def _save(sidecar: Path, index: ShardIndex) -> None:
    """Write an index that is complete or absent; several ranks may do so at once."""
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".index-", suffix=".npz", dir=sidecar.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    text=index.names.text,
                    ends=index.names.ends,
                    offsets=index.offsets,
                    sizes=index.sizes,
                )
            Path(partial).replace(sidecar)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        # The index only saves time: a full or read-only cache must not stop a run.
        LOGGER.warning("index %s cannot be kept: %s", sidecar, error)
