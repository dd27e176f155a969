"""What every place that images can come from has in common."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image, ImageFile

from kuea_mllm.errors import KueaError, UnreadableImage

E = TypeVar("E", bound=KueaError)

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# Not the image's fault: these must never be counted as an unreadable image.
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
REMEDY = "Replace or remove it; `kuea-mllm doctor --images SOURCE` lists all such images."


@runtime_checkable
class ImageSource(Protocol):
    """Images that can be read by position, in an order that never changes.

    Implementations keep no Python object per image and no open file across processes, so that a
    DataLoader may fork or pickle them at any time.
    """

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, index: int) -> Image.Image:
        """Decode one image completely.

        Raises:
            UnreadableImage: If that is impossible; names the image.
        """
        ...

    def name(self, index: int) -> str:
        """Return where one image lies: a path, or `shard.tar!member`."""
        ...

    def fingerprint(self) -> str:
        """Hash names and sizes of the whole listing, without reading the images."""
        ...


class Names:
    """Many short byte strings in two arrays.

    A million Python strings would be copied into every worker process bit by bit, because counting
    references writes to them; two arrays stay shared. Unlike a numpy array of byte strings, one
    long name does not make all others long.
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.text = np.frombuffer(b"".join(names), dtype=np.uint8)

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> Names:
        """Put together what `text` and `ends` of another table hold."""
        table = cls.__new__(cls)
        table.text, table.ends = text, ends
        return table

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"position {index} of {len(self.ends)} images")
        start = int(self.ends[index - 1]) if index else 0
        return self.text[start : int(self.ends[index])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file completely.

    Raises:
        UnreadableImage: If the file is missing, truncated or not an image; names it.
    """
    return _decode(path, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file completely.

    Raises:
        UnreadableImage: If they are cut short or not an image; names it.
    """
    return _decode(io.BytesIO(data), name)


def decode_cell(cell: Any, name: str) -> Image.Image:
    """Decode a cell of a table: bytes, or a mapping with `bytes` and `path`.

    Raises:
        UnreadableImage: If it holds no image; names it.
    """
    if isinstance(cell, bytes):
        return decode_image(cell, name)
    data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if data is not None:
        return decode_image(data, name)
    # Relative paths tell where the image came from, not where it is.
    if path is None or not Path(path).is_absolute():
        raise unreadable(name, "the row holds no bytes")
    return read_image(path)


def _decode(file: str | Path | io.BytesIO, name: str) -> Image.Image:
    # lmms-eval switches it on for the whole process when it is imported: half an image would do.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(file) as image:
            image.load()
            return image
    # Damaged files make Pillow's decoders raise almost anything, but never MemoryError on purpose.
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            raise
        raise unreadable(name, " ".join(str(error).split())) from error


def unreadable(name: str, reason: str) -> UnreadableImage:
    """Return the error for one image, in the one form that all sources use."""
    return UnreadableImage(f"image {name} cannot be read: {reason.rstrip('.')}.", REMEDY)


def as_raised_in_worker(error: E) -> E:
    """Return the error without the traceback text that a DataLoader worker wraps around it."""
    if "Original Traceback" not in error.problem:
        return error
    # The last line of the traceback is "module.NameOfError: problem", then the remedy.
    last = error.problem.rpartition(f"{type(error).__name__}: ")[2]
    problem, _, remedy = last.partition("\n  ")
    return type(error)(problem.strip(), remedy.strip())


def check_images(source: ImageSource) -> Iterator[tuple[str, str | None]]:
    """Decode every image on all cores; yield each name with its problem, or None."""

    def check(index: int) -> tuple[str, str | None]:
        try:
            source.read(index)
        except UnreadableImage as error:
            return source.name(index), error.problem
        return source.name(index), None

    # Threads are enough: Pillow decodes without holding the interpreter lock.
    with ThreadPool() as pool:
        yield from pool.imap(check, range(len(source)), chunksize=16)


def has_image_suffix(name: str) -> bool:
    """Whether a file name ends like an image's."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - a million times
