"""Reading one list of a large JSON file entry by entry, so that the file is never held whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from kuea_mllm.errors import DataError

_CHUNK = 1 << 20
_BLANK = " \t\n\r"
DAMAGED = "is it cut short? get it again"


def stream_entries(path: Path, key: str) -> Iterator[Any]:
    """Yield the entries of the list under a key of a JSON object.

    The whole file is read to its end, so that one that is cut short is refused.

    Args:
        path: A file like `{"info": ..., "annotations": [...]}`.
        key: Key of the list.

    Raises:
        DataError: If the file is missing or is not JSON.
        KeyError: If the object has no such key.
        TypeError: If the file is no object, or the key holds no list.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from _Reader(file).entries(key)
    except FileNotFoundError:
        raise DataError(
            f"file {path} does not exist.",
            "See docs/fewshot.md for the files that a data set's folder has to hold.",
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"file {path} cannot be read: {error.msg} ({DAMAGED}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"file {path} cannot be read: {error.reason} ({DAMAGED}).") from error
    except OSError as error:
        raise DataError(f"file {path} cannot be read: {error.strerror}.") from error


class _Reader:
    """Parses a file through a window of text."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""
        self.place = 0
        self.is_whole = False
        self.decoder = json.JSONDecoder()

    def entries(self, key: str) -> Iterator[Any]:
        if self._next() != "{":
            # Says what is wrong with a file that is no JSON at all.
            self._value()
            raise TypeError("an object was expected")
        self._skip("{")
        is_found = False
        while self._next() != "}":
            name = self._value()
            self._skip(":")
            if name != key:
                self._leave_out()
            elif self._next() == "[":
                is_found = True
                yield from self._list()
            else:
                raise TypeError(f"key '{key}' holds no list")
            if self._next() != "}":
                self._skip(",")
        self._skip("}")
        if self._next():
            raise json.JSONDecodeError("Extra data", self.text, self.place)
        if not is_found:
            raise KeyError(key)

    def _leave_out(self) -> None:
        # A list that is not asked for may be as long as the file.
        if self._next() != "[":
            self._value()
            return
        for _ in self._list():
            pass

    def _list(self) -> Iterator[Any]:
        self._skip("[")
        while self._next() != "]":
            yield self._value()
            if self._next() != "]":
                self._skip(",")
        self._skip("]")

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError:
                if self.is_whole:
                    raise
            else:
                # A number that ends with the window may go on behind it.
                if end < len(self.text) or self.is_whole:
                    self.place = end
                    return value
            self._more()

    def _next(self) -> str:
        """Return the next character that is not blank; nothing at the end."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in _BLANK:
                    return self.text[self.place]
                self.place += 1
            if self.is_whole:
                return ""
            self._more()

    def _skip(self, mark: str) -> None:
        if self._next() != mark:
            raise json.JSONDecodeError(f"Expecting '{mark}' delimiter", self.text, self.place)
        self.place += 1

    def _more(self) -> None:
        rest = self.text[self.place :]
        # Ever more, so that a long value is not tried again and again.
        added = self.file.read(max(_CHUNK, len(rest)))
        self.is_whole = not added
        self.text, self.place = rest + added, 0
