"""Open files that threads and forked processes may read at the same time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any

# Well below the usual limit of 1024 open files per process.
OPEN_FILES = 128


class _Descriptor:
    """A file descriptor that is closed when the last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        number = getattr(self, "number", None)
        if number is not None:
            os.close(number)


class FileReader:
    """Reads byte ranges of many files, keeping the most recently used ones open.

    Only `pread` is used: it has no position that processes sharing a descriptor could move for one
    another. Pickling leaves the open files behind.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only where the file ends.

        Raises:
            OSError: If the file cannot be opened or read.
        """
        descriptor = self._descriptor(path)
        parts = []
        while size > 0:
            part = os.pread(descriptor.number, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _descriptor(self, path: str) -> _Descriptor:
        if self._process != os.getpid():
            # A fork may have copied the lock while another thread held it.
            self._lock = threading.Lock()
            self._open = OrderedDict()
            self._process = os.getpid()
        with self._lock:
            descriptor = self._open.get(path)
            if descriptor is None:
                descriptor = self._open[path] = _Descriptor(path)
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
