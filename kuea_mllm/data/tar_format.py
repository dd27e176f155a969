"""The tar format, read strictly: a file that is damaged or cut short is always an error.

Python's `tarfile` takes a damaged header after the first member for the end of the file, and so
would lose the rest of a shard without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kuea_mllm.errors import DataError

BLOCK = 512
# Zstandard, bzip2, xz, gzip.
COMPRESSED = (b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"\x1f\x8b")
# What may follow the end mark: tar fills up the last record, of 1 MiB at most in practice.
_LONGEST_PADDING = 1 << 20
_LONGEST_HEADER = 1 << 20
_EXTENSIONS = (b"x", b"g", b"L", b"K")
_FILES = (b"0", b"\0", b"7")


@dataclass(frozen=True)
class Member:
    """One regular file in a tar file: its name, and where its bytes are."""

    name: bytes
    offset: int
    size: int


class Reader(Protocol):
    """A tar file that is read front to back."""

    position: int

    def take(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end."""
        ...

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; return how many there were."""
        ...


def walk(path: str, reader: Reader) -> Iterator[Member]:
    """Yield the regular files of a tar file.

    Whoever iterates may take the content of a member, all of it or none, before asking for the
    next one.

    Args:
        path: For messages.
        reader: At the beginning of the file.

    Raises:
        DataError: If the file is damaged or cut short; names the byte position and the last member
            that is whole.
    """
    last, overrides = "none", _Overrides()
    while True:
        position = reader.position
        header = reader.take(BLOCK)
        if len(header) == BLOCK and not any(header):
            _require_end(path, reader, position, last)
            return
        if len(header) < BLOCK:
            raise damaged(path, position, last, "it ends without the end mark: it is cut short")
        if not _checksum_is_right(header):
            raise damaged(path, position, last, "there is no valid member header")
        kind = header[156:157]
        size = _number(header[124:136])
        if kind in _EXTENSIONS:
            if size > _LONGEST_HEADER:
                raise damaged(path, position, last, f"a member header claims {size} bytes")
            overrides.add(kind, reader.take(size))
            name = b"(extended header)"
        else:
            size = overrides.size(size)
            name = overrides.name(_name(header))
            if kind in _FILES:
                yield Member(name, position + BLOCK, size)
        # Whatever of the content has not been taken yet.
        end = position + BLOCK + size
        rest = end - reader.position
        if reader.skip(rest) < rest:
            raise damaged(
                path,
                position,
                last,
                f"member {os.fsdecode(name)} needs {size} bytes, but only "
                f"{reader.position - position - BLOCK} follow: it is cut short",
            )
        reader.skip(-size % BLOCK)
        if kind not in _EXTENSIONS:
            last, overrides = os.fsdecode(name), overrides.next()


def damaged(path: str, position: int, last: str, what: str) -> DataError:
    """Return the error for a shard that cannot be read to its end."""
    return DataError(
        f"shard {path} is damaged at byte {position}: {what}; the last whole member is {last}.",
        "Copy or download this shard again, or take it out.",
    )


class _Overrides:
    """What extended headers say about the member that follows them."""

    def __init__(self, common: dict[str, bytes] | None = None) -> None:
        self._common = dict(common or {})
        self._pax: dict[str, bytes] = {}

    def add(self, kind: bytes, text: bytes) -> None:
        if kind == b"L":
            self._pax["path"] = text.rstrip(b"\0")
        elif kind == b"x":
            self._pax |= _pax_records(text)
        elif kind == b"g":
            self._common |= _pax_records(text)

    def size(self, stated: int) -> int:
        return int(self._pax.get("size", stated))

    def name(self, stated: bytes) -> bytes:
        return self._pax.get("path") or self._common.get("path") or stated

    def next(self) -> _Overrides:
        return _Overrides(self._common)


def _require_end(path: str, reader: Reader, position: int, last: str) -> None:
    # A hole of zeros, left by an interrupted copy, looks like the end mark; so does the seam of two
    # tar files put together.
    padding = reader.take(_LONGEST_PADDING + 1)
    if len(padding) > _LONGEST_PADDING or any(padding):
        raise damaged(path, position, last, "there is an end mark, but the file goes on after it")


def _checksum_is_right(header: bytes) -> bool:
    try:
        stated = _number(header[148:156])
        _number(header[124:136])
    except ValueError:
        return False
    return stated == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for what octal digits cannot hold
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits else 0


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(text: bytes) -> dict[str, bytes]:
    records = {}
    while text:
        length, space, _ = text.partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", errors="replace")] = value
        text = text[int(length) :]
    return records
