"""Embeddings of one frozen model on disk: one row per image, memory-mapped, written once.

A store is a directory named by a digest of everything that its numbers depend on. Its files have
room for the whole listing from the start, but are sparse: only rows that were computed take disk.

Rows are written with `pwrite` and only read through the memory map: a full disk is then an error
that can be reported, where a store into a mapped hole would kill the process with SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kuea_mllm.data.cache import mark_used
from kuea_mllm.errors import DataError, EnvironmentFailure, OutputError, UserError
from kuea_mllm.io import disk_errors_named, read_json, write_json
from kuea_mllm.manifest import library_versions, utc_now

SCHEMA_VERSION = 1
PREFIX = "embeddings-"
Precision = Literal["fp32", "bf16"]
Storage = Literal["float32", "bfloat16"]
# NumPy has no bfloat16: its two bytes are kept as they are.
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<i2"),
}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_PAGE = 4096


@dataclass(frozen=True)
class CacheKey:
    """Everything that the numbers of a store depend on.

    Attributes:
        images: Fingerprint of the listing.
        population: Number of images in it.
        transform: Fingerprint of the transform.
        embedder: Fingerprint of the model: weights, readout, pixel statistics, input size.
        precision: What it computes in.
        storage: How a number is kept; exact for what the model returns.
        width: Numbers in one embedding.
    """

    images: str
    population: int
    transform: str
    embedder: str
    precision: Precision
    storage: Storage
    width: int

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any part of the key."""
        content = json.dumps([SCHEMA_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class EmbeddingStore:
    """Embeddings of every image of a listing by one model; opened for reading on first use.

    Use `EmbeddingStore.open` or `EmbeddingStore.at`. Safe to pass to worker processes: each maps
    the files for itself.

    Attributes:
        directory: Where it is.
        key: What its numbers depend on.
        description: The model, in words.
        created: When, in UTC.
    """

    def __init__(self, directory: Path, key: CacheKey, description: str, created: str) -> None:
        self.directory, self.key = directory, key
        self.description, self.created = description, created

    @classmethod
    def open(cls, root: Path, key: CacheKey, *, description: str) -> EmbeddingStore:
        """Open the store of a key, or create it empty.

        Raises:
            UserError: If what lies there is damaged, or is not of this key.
            OutputError: If it cannot be created.
        """
        directory = root / f"{PREFIX}{key.digest}"
        if not (directory / "cache.json").exists():
            _create(directory, key, description)
        store = cls.at(directory, key)
        mark_used(directory / "cache.json")
        return store

    @classmethod
    def at(cls, directory: Path, key: CacheKey | None = None) -> EmbeddingStore:
        """Open an existing store and check its description and the sizes of its files.

        Args:
            directory: The store.
            key: What it has to be of; by default whatever it says itself.

        Raises:
            UserError: If there is none, it is damaged, or not of this key.
        """
        if not (directory / "cache.json").is_file():
            raise DataError(
                f"{directory} is no cache of embeddings: it holds no cache.json.",
                "`kuea-mllm cache ls` lists those there are.",
            )
        content = read_json(directory / "cache.json")
        try:
            if content["schema_version"] != SCHEMA_VERSION:
                raise _damaged(directory, f"its schema_version is {content['schema_version']}")
            found = CacheKey(**content["key"])
            store = cls(directory, found, str(content["embedder"]), str(content["created"]))
        except (KeyError, TypeError) as error:
            raise _damaged(
                directory, f"cache.json lacks or holds an unknown key: {error}"
            ) from None
        if f"{PREFIX}{found.digest}" != directory.name or (key is not None and key != found):
            raise _damaged(directory, "the key in cache.json is not the one it is named by")
        for name, (shape, dtype) in store.layout().items():
            _check_array(directory / name, shape, dtype)
        return store

    def __getstate__(self) -> dict[str, Any]:
        kept = ("directory", "key", "description", "created")
        return {name: self.__dict__[name] for name in kept}

    @functools.cached_property
    def embeddings(self) -> NDArray[Any]:
        """(images, width), float32 or the bytes of bfloat16 as int16; only done rows count."""
        return self._map("embeddings.npy")

    @functools.cached_property
    def checksums(self) -> NDArray[np.uint32]:
        """(images, 2): crc32 of the uint8 pixels that went in, and of the row that came out."""
        return self._map("checksums.npy")

    @functools.cached_property
    def done(self) -> NDArray[np.uint8]:
        """(images,): 1 where a row is complete and on disk; follows other processes."""
        return self._map("done.npy")

    def refresh(self) -> None:
        """Map the files anew: a network file system shows what others wrote only after opening."""
        for name in ("embeddings", "checksums", "done"):
            self.__dict__.pop(name, None)

    def missing(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of the positions have no row yet."""
        mask: NDArray[np.bool_] = self.done[positions] == 0
        return mask

    def row(self, position: int) -> NDArray[Any]:
        """Return a copy of one row, checked against its checksum.

        Raises:
            EnvironmentFailure: If the row is not what was written.
        """
        row = np.array(self.embeddings[position])
        if zlib.crc32(row.data) != self.checksums[position, 1]:
            raise EnvironmentFailure(
                f"{self.directory}/embeddings.npy: row {position} is damaged (its checksum is "
                "wrong).",
                f"Remove the cache (`kuea-mllm cache rm {self.key.digest}`) and build it again.",
            )
        return row

    def row_bytes(self) -> int:
        """Return the size of one embedding in bytes."""
        return self.key.width * _NUMPY_TYPES[self.key.storage].itemsize

    def disk_bytes(self) -> int:
        """Return what its files take on disk; holes take nothing."""
        return sum(f.stat().st_blocks * 512 for f in self.directory.iterdir() if f.is_file())

    @property
    def used(self) -> float:
        """When it was last opened or written to, in seconds since 1970."""
        return max((self.directory / name).stat().st_mtime for name in ("cache.json", "done.npy"))

    def needed_bytes(self, count: int) -> int:
        """Return the most that `count` more rows can take on disk: files grow by whole pages."""
        pages = -(-self.row_bytes() // _PAGE) + 1
        whole = self.key.population * self.row_bytes() + _PAGE
        return min(count * pages * _PAGE, whole) + min(2 * count * _PAGE, 9 * self.key.population)

    def layout(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return shape and type of each file."""
        count = self.key.population
        return {
            "embeddings.npy": ((count, self.key.width), _NUMPY_TYPES[self.key.storage]),
            "checksums.npy": ((count, 2), np.dtype("<u4")),
            "done.npy": ((count,), np.dtype("u1")),
        }

    def _map(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.directory / name, mmap_mode="r")
        # A plain view: np.memmap spends microseconds on its own bookkeeping at every index.
        return array.view(np.ndarray)


def cache_root(directory: str | Path | None = None) -> Path:
    """Return where caches are kept: as given, else $KUEA_MLLM_CACHE, else below $HF_HOME."""
    chosen = directory or os.environ.get("KUEA_MLLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "kuea_mllm"


def list_stores(root: Path) -> Iterator[tuple[Path, EmbeddingStore | None, str]]:
    """Yield every store below a root: directory, store, and what is wrong with it (or "")."""
    for directory in sorted(root.glob(f"{PREFIX}*")):
        try:
            yield directory, EmbeddingStore.at(directory), ""
        except UserError as error:
            yield directory, None, error.problem


def remove_store(directory: Path) -> None:
    """Delete a store, whole or damaged.

    Raises:
        UserError: If another process is building it.
    """
    lock = directory / "lock"
    if lock.exists():
        with _whole_lock(lock, wait=False) as is_held:
            if not is_held:
                raise UserError(
                    f"cache {directory} is being built by another process.",
                    "Wait for it, or stop it first.",
                )
            # The description goes first: what is left after a kill is then no store any more.
            (directory / "cache.json").unlink(missing_ok=True)
            for path in sorted(directory.iterdir()):
                path.unlink()
    directory.rmdir()


def disk_errors(directory: Path) -> AbstractContextManager[None]:
    """Turn a full disk into one line that names the cache; see `io.disk_errors_named`."""
    return disk_errors_named(
        directory,
        remedy="Free some space and run the command again: it goes on where it stopped. Or choose "
        "another place with targets.directory or $KUEA_MLLM_CACHE.",
    )


def _create(directory: Path, key: CacheKey, description: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = directory / "lock"
        lock.touch()
        with disk_errors(directory), _whole_lock(lock, wait=True):
            if (directory / "cache.json").exists():
                return  # another process was faster
            store = EmbeddingStore(directory, key, description, utc_now())
            for name, (shape, dtype) in store.layout().items():
                np.lib.format.open_memmap(directory / name, mode="w+", dtype=dtype, shape=shape)
            # Last: a directory without it is not a store yet, and is made again.
            content = {
                "schema_version": SCHEMA_VERSION,
                "kind": "embeddings",
                "embedder": description,
                "key": asdict(key),
                "created": store.created,
                "versions": library_versions(),
            }
            write_json(directory / "cache.json", content)
    except OSError as error:
        raise OutputError(
            f"cache {directory} cannot be created: {error.strerror}.",
            "Choose another place with targets.directory or $KUEA_MLLM_CACHE.",
        ) from error


@contextmanager
def _whole_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise lock_failure(path.parent, error) from error
            yield False
            return
        yield True


def lock_failure(directory: Path, error: OSError) -> EnvironmentFailure:
    """Return the error for a file system that gives no lock."""
    reason = "has no file locks" if error.errno in _NO_LOCKS else f"says: {error.strerror}"
    return EnvironmentFailure(
        f"cache {directory} cannot be locked: its file system {reason}.",
        "Choose a place on another disk with targets.directory or $KUEA_MLLM_CACHE.",
    )


def _damaged(directory: Path, problem: str) -> DataError:
    return DataError(
        f"cache {directory} cannot be used: {problem}.",
        f"Remove it (`kuea-mllm cache rm {directory.name.removeprefix(PREFIX)}`); it is built "
        "again when it is needed.",
    )


def _check_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if not path.is_file():
        raise _damaged(path.parent, f"{path.name} is missing")
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise _damaged(path.parent, f"{path.name} is truncated or no .npy file ({error})") from None
    if array.shape != shape or array.dtype != dtype:
        raise _damaged(
            path.parent,
            f"{path.name} holds {array.dtype} {array.shape}, its key says {dtype} {shape}",
        )
