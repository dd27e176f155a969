"""Write rows of a store, from several processes at once."""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuea_mllm.alignment.target_store import EmbeddingStore, disk_errors, lock_failure


class StoreWriter:
    """Writes rows of a store and claims them, so that several processes build one store.

    A claim is a POSIX record lock over the rows' numbers in the file `lock`: any number of
    processes, also on other machines with a shared file system, take different rows, and the
    kernel drops the claims of a process that dies. Claims do not hold between threads.
    """

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._lock = os.open(store.directory / "lock", os.O_RDWR)
        self._files = {name: os.open(store.directory / name, os.O_RDWR) for name in store.layout()}
        self._offsets = {name: _data_offset(store.directory / name) for name in store.layout()}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (*self._files.values(), self._lock):
            os.close(descriptor)

    def claim(self, first: int, last: int) -> bool:
        """Try to reserve the rows first..last; False if another process holds one of them."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, last - first + 1, first)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise lock_failure(self.store.directory, error) from error
        return True

    def release(self, first: int, last: int) -> None:
        """Give up the claim of the rows first..last."""
        fcntl.lockf(self._lock, fcntl.LOCK_UN, last - first + 1, first)

    def write(
        self, positions: NDArray[np.int64], rows: NDArray[Any], pixel_checksums: NDArray[np.uint32]
    ) -> None:
        """Write rows; they do not count before `flush` and `mark_done`.

        Args:
            positions: Where they belong, sorted, (n,).
            rows: (n, width) in the store's type.
            pixel_checksums: crc32 of the pixels of each, (n,).

        Raises:
            EnvironmentFailure: If the disk is full.
        """
        row_checksums = [zlib.crc32(row.data) for row in rows]
        checksums = np.stack([pixel_checksums, row_checksums], axis=1).astype("<u4")
        with disk_errors(self.store.directory):
            for run in _runs(positions):
                self._write("embeddings.npy", positions[run][0], rows[run])
                self._write("checksums.npy", positions[run][0], checksums[run])

    def flush(self) -> None:
        """Wait until everything written is on disk: only then may it be marked as done."""
        with disk_errors(self.store.directory):
            for name in ("embeddings.npy", "checksums.npy"):
                os.fsync(self._files[name])

    def mark_done(self, positions: NDArray[np.int64]) -> None:
        """Let rows count from now on."""
        with disk_errors(self.store.directory):
            for run in _runs(positions):
                marks = np.ones(run.stop - run.start, np.uint8)
                self._write("done.npy", positions[run][0], marks)

    def _write(self, name: str, position: np.int64, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).data.cast("B")
        offset = self._offsets[name] + int(position) * (len(data) // len(values))
        while data:  # pwrite may stop early when a disk fills up; the next call then fails
            written = os.pwrite(self._files[name], data, offset)
            data, offset = data[written:], offset + written


def _data_offset(path: Path) -> int:
    array = np.load(path, mmap_mode="r")
    return int(array.offset)


def _runs(positions: NDArray[np.int64]) -> Iterator[slice]:
    """Cut sorted positions into runs of neighbours, one write each."""
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(positions)], strict=True):
        yield slice(start, stop)
