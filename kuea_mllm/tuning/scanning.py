"""Reads the records of a large JSON file one after the other, never holding all of them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kuea_mllm.errors import DataError

_CHUNK = 4 << 20
# What does not end within this many characters is a broken file, not a long record.
_LONGEST_RECORD = 64 << 20
_BLANK = " \t\r\n"
_DECODER = json.JSONDecoder()


def scan_records(
    path: Path, *, progress: Callable[[int], object] = lambda read: None
) -> Iterator[Any]:
    """Yield the elements of a JSON array, or the values of a JSONL file.

    Args:
        path: The file; which of the two it is shows in its first character.
        progress: Called with the number of bytes that were read since the last call.

    Raises:
        DataError: If the file is missing, or not JSON; names the record and the place.
    """
    try:
        with path.open("rb") as file:
            yield from _Scanner(path, file, progress).records()
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}.") from error


class _Scanner:
    def __init__(self, path: Path, file: BinaryIO, progress: Callable[[int], object]) -> None:
        self._path = path
        self._file = file
        self._progress = progress
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._dropped = 0  # characters before `_text`
        self._is_over = False
        self._count = 0

    def records(self) -> Iterator[Any]:
        first = self._peek()
        if first == "":
            raise DataError(f"data file {self._path} is empty.")
        if first == "[":
            yield from self._array()
        elif first == "{":
            yield from self._lines()
        else:
            raise self._broken("it begins neither with [ (a list of records) nor with { (JSONL)")

    def _array(self) -> Iterator[Any]:
        self._at += 1
        if self._peek() == "]":
            self._at += 1
        else:
            while True:
                yield self._value()
                separator = self._peek()
                if separator not in ("]", ","):
                    raise self._broken("there is no comma before it" if separator else "it ends")
                self._at += 1
                if separator == "]":
                    break
        if self._peek():
            raise self._broken("something follows the end of the list")

    def _lines(self) -> Iterator[Any]:
        while self._peek():
            yield self._value()

    def _peek(self) -> str:
        """Skip blanks; return the next character, empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_CHUNK):
                return ""

    def _value(self) -> Any:
        if self._peek() == "":
            raise self._broken("it ends")
        wanted = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A record that the end of the buffer cuts in two looks just like a broken one.
                inside = error.pos - self._at
                if len(self._text) - self._at < _LONGEST_RECORD and self._more(wanted):
                    wanted *= 2
                    continue
                raise self._broken(error.msg, inside) from error
            except RecursionError as error:
                raise self._broken("it is nested too deeply") from error
            self._at = end
            self._count += 1
            return value

    def _more(self, wanted: int) -> bool:
        """Read on; return whether there was anything left."""
        if self._is_over:
            return False
        data = self._file.read(wanted)
        self._progress(len(data))
        self._is_over = not data
        try:
            text = self._decode.decode(data, final=self._is_over)
        except UnicodeDecodeError as error:
            raise self._broken("it is not UTF-8 text") from error
        self._dropped += self._at
        self._text = self._text[self._at :] + text
        self._at = 0
        return not self._is_over or bool(text)

    def _broken(self, reason: str, inside: int = 0) -> DataError:
        place = self._dropped + self._at + inside
        return DataError(
            f"data file {self._path} is not valid JSON at record {self._count}, character {place}: "
            f"{reason}.",
            "Download or write it again; a list of records or one record on each line is expected.",
        )
