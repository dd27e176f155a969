"""The lock of a directory that one run writes to (no torch)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kuea_mllm.errors import OutputError

LOCK = ".lock"

# Descriptors of the locks that this process holds.
_HELD: set[int] = set()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a directory, which the kernel releases however a process ends.

    Raises:
        OutputError: If another process holds it; names that process.
    """
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode(errors="replace").strip()
            raise OutputError(
                f"another process is working on {path} (process {owner or 'unknown'}).",
                "Wait for it, or choose another --out.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _leave_to_parent(descriptor)
        yield
    finally:
        _HELD.discard(descriptor)
        os.close(descriptor)


def _leave_to_parent(descriptor: int) -> None:
    """Keep children out of a lock: a decoder outlives its killed parent by some seconds."""
    if not _HELD:
        os.register_at_fork(after_in_child=_close_held)
    _HELD.add(descriptor)


def _close_held() -> None:
    while _HELD:
        os.close(_HELD.pop())
