"""Pictures for galleries: those that the evaluation kept, or the original files.

Results may come from somebody else, and name any file of this machine as the image of a question.
Of files outside of the results only what decodes as a picture of a common format and of bounded
size gets into a report, as pixels that are encoded anew (288 at most across): never a file's bytes,
nor what is hidden in them.
"""

from __future__ import annotations

import io
import json
import re
import stat
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
# How files of these formats begin: one that begins so and cannot be read was cut short or damaged.
_BEGINNING = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*", re.DOTALL)


class _NoPictureError(Exception):
    """Why a file gives no picture: the end of a sentence that begins with its name."""


class PictureShelf:
    """The pictures of one or two results directories.

    Args:
        results: Results directories; the first that has a picture gives it.
    """

    def __init__(self, results: Sequence[Path]) -> None:
        self.results = [Path(path) for path in results]
        self._indexes: dict[tuple[Path, str], Mapping[str, str]] = {}
        self._pictures: dict[Path, tuple[bytes | None, str]] = {}

    def has(self, task: str, row: Mapping[str, Any]) -> bool:
        """Tell whether there is a picture of a sample row, as far as names tell."""
        return self._stored(task, row) is not None or bool(row.get("image"))

    def load(self, task: str, row: Mapping[str, Any]) -> tuple[bytes | None, str]:
        """Return the picture of a sample row, and why there is none if there is none."""
        reason = NOT_STORED
        if (stored := self._stored(task, row)) is not None:
            picture, fault = self._read(stored, is_ours=True)
            if picture is not None:
                return picture, ""
            reason = f"picture {stored.name} {fault}"
        original = row.get("image")
        if not original or not isinstance(original, str):
            return None, reason
        picture, fault = self._read(Path(original))
        return picture, "" if picture is not None else f"file {original} {fault}"

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

    def _read(self, path: Path, *, is_ours: bool = False) -> tuple[bytes | None, str]:
        if path not in self._pictures:
            try:
                self._pictures[path] = _read_small(path, is_ours=is_ours), ""
            except _NoPictureError as error:
                self._pictures[path] = None, str(error)
        return self._pictures[path]


def _read_small(path: Path, *, is_ours: bool) -> bytes:
    """Return a picture as PNG or JPEG of a few kilobytes.

    Args:
        path: The file.
        is_ours: Whether it lies in the results, small already: its bytes are taken as they are.

    Raises:
        _NoPictureError: If the file is not one.
    """
    from PIL import Image, UnidentifiedImageError

    size = _size_of(path)
    try:
        with warnings.catch_warnings():
            # Its size is looked at here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > LARGEST_PICTURE:
                    raise _too_many_pixels()
                small, form = image.convert("RGB"), image.format
        if is_ours and form in ("PNG", "JPEG") and size <= LIMIT_BYTES:
            return path.read_bytes()
    except (_NoPictureError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise _too_many_pixels() from None
    except UnidentifiedImageError:
        raise _NoPictureError(_fault_of_unknown(path)) from None
    # PIL's decoders fail in many ways; the format was known by then.
    except Exception:
        raise _NoPictureError("is cut short or damaged") from None
    if form == "PNG" and max(small.size) <= MAX_SIDE:
        content = _encoded(small, "PNG")
        if len(content) <= LIMIT_BYTES:
            return content
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return _encoded(small, "JPEG", quality=QUALITY)


def _size_of(path: Path) -> int:
    """Return the size of a file that may be a picture.

    Raises:
        _NoPictureError: If there is no such file, or it cannot be one.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _NoPictureError("is not a file")
        # A pipe would wait for ever, so this comes after the check of what it is.
        path.open("rb").close()
    except PermissionError:
        raise _NoPictureError("may not be read by this user") from None
    # Names that are too long or hold a null byte name no file either.
    except (OSError, ValueError):
        # A relative name was written down in another folder, perhaps.
        where = "on this machine" if path.is_absolute() else f"in {Path.cwd()}"
        raise _NoPictureError(f"is not {where}") from None
    if not found.st_size:
        raise _NoPictureError("is empty")
    if found.st_size > LARGEST_FILE:
        raise _NoPictureError(f"is too large: more than {LARGEST_FILE / 1e6:g} MB")
    return found.st_size


def _too_many_pixels() -> _NoPictureError:
    return _NoPictureError(f"is too large: more than {LARGEST_PICTURE / 1e6:g} million pixels")


def _fault_of_unknown(path: Path) -> str:
    with path.open("rb") as file:
        begins_like_one = _BEGINNING.match(file.read(12))
    if begins_like_one:
        return "is cut short or damaged"
    return f"is not a picture ({', '.join(_FORMATS)})"


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
