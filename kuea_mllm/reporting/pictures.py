"""Pictures for galleries: those that the evaluation kept, or the original files.

Results may come from somebody else, and name any file of this machine as the image of a question.
Of files outside of the results only what decodes as a picture of a common format and of bounded
size gets into a report, as pixels that are encoded anew (288 at most across): never a file's bytes,
nor what is hidden in them.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MAX_SIDE = 288
QUALITY = 70
LIMIT_BYTES = 16_000
"""Larger pictures are made smaller, so that a report with hundreds of them stays small."""

LARGEST_FILE = 64_000_000
"""Bytes; larger files are not opened."""

LARGEST_PICTURE = 64_000_000
"""Pixels; larger pictures are not decoded."""

NOT_STORED = "no picture stored"
# Without those that need other programs to decode (EPS calls Ghostscript).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class PictureShelf:
    """The pictures of one or two results directories.

    Args:
        results: Results directories; the first that has a picture gives it.
    """

    def __init__(self, results: Sequence[Path]) -> None:
        self.results = [Path(path) for path in results]
        self._indexes: dict[tuple[Path, str], Mapping[str, str]] = {}
        self._pictures: dict[Path, bytes | None] = {}

    def has(self, task: str, row: Mapping[str, Any]) -> bool:
        """Tell whether there is a picture of a sample row, as far as names tell."""
        return self._stored(task, row) is not None or bool(row.get("image"))

    def load(self, task: str, row: Mapping[str, Any]) -> tuple[bytes | None, str]:
        """Return the picture of a sample row, and why there is none if there is none."""
        stored = self._stored(task, row)
        if stored is not None and (picture := self._read(stored, is_ours=True)):
            return picture, ""
        original = row.get("image")
        if not original or not isinstance(original, str):
            return None, NOT_STORED if stored is None else f"picture {stored.name} is not readable"
        # Path.is_file raises where a folder may not be looked into.
        if not os.path.isfile(original):  # noqa: PTH113
            return None, f"file {original} is not on this machine"
        picture = self._read(Path(original))
        return picture, "" if picture is not None else f"file {original} is not readable"

    def _stored(self, task: str, row: Mapping[str, Any]) -> Path | None:
        for results in self.results:
            index = self._indexes.get((results, task))
            if index is None:
                index = self._indexes[results, task] = _read_index(results, task)
            name = index.get(str(row["doc_id"]))
            if name is not None:
                path = results / "thumbnails" / "pictures" / name
                # A link may lead to any picture of this machine.
                return path if path.resolve().is_relative_to(results.resolve()) else None
        return None

    def _read(self, path: Path, *, is_ours: bool = False) -> bytes | None:
        if path not in self._pictures:
            self._pictures[path] = _read_small(path, is_ours=is_ours)
        return self._pictures[path]


def _read_small(path: Path, *, is_ours: bool) -> bytes | None:
    """Return a picture as PNG or JPEG of a few kilobytes; None if the file is not one.

    Args:
        path: The file.
        is_ours: Whether it lies in the results, small already: its bytes are taken as they are.
    """
    from PIL import Image

    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            return None
        with warnings.catch_warnings():
            # Its size is looked at here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > LARGEST_PICTURE:
                    return None
                small, form = image.convert("RGB"), image.format
        if is_ours and form in ("PNG", "JPEG") and size <= LIMIT_BYTES:
            return path.read_bytes()
    # PIL's decoders fail in many ways.
    except Exception:
        return None
    if form == "PNG" and max(small.size) <= MAX_SIDE:
        content = _encoded(small, "PNG")
        if len(content) <= LIMIT_BYTES:
            return content
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return _encoded(small, "JPEG", quality=QUALITY)


def _encoded(picture: Picture, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, optimize=True, **options)
    return buffer.getvalue()


def _read_index(results: Path, task: str) -> Mapping[str, str]:
    """Return the name of each question's picture."""
    path = results / "thumbnails" / f"{task.replace('/', '_')}.jsonl"
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            doc_id, name = str(entry["doc_id"]), str(entry["picture"])
        # A line that an interrupted run cut short costs one picture.
        except (KeyError, TypeError, ValueError):
            continue
        if Path(name).name == name:
            found[doc_id] = name
    return found
