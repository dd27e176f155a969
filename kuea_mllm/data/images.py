"""Folders of images as a PyTorch data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kuea_mllm.errors import DataError, UnreadableImage

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


class ImageItem(TypedDict):
    """One item: the picture in [0, 1], (3, size, size), and its position in the listing."""

    pixels: Tensor
    index: int


class ImageFolder(Dataset[ImageItem]):
    """All images below a folder, in sorted order; sub-folders (classes) carry no meaning.

    Args:
        folder: Searched recursively; symbolic links are followed.
        transform: Picture to float tensor in [0, 1], (3, size, size).

    Raises:
        DataError: If the folder is missing, holds no image, or a part of it cannot be listed.
    """

    def __init__(self, folder: str | Path, transform: Callable[[Image.Image], Tensor]) -> None:
        require_image_folder(folder)
        self.folder = Path(folder)
        self.transform = transform
        names = sorted(_image_names(self.folder))
        # One array instead of a million Python strings: worker processes share it after fork
        # instead of copying it when reference counts change.
        self._names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> ImageItem:
        return {"pixels": self.transform(read_image(self.path(index))), "index": int(index)}

    def path(self, index: int) -> Path:
        """Return the file of one image."""
        return self.folder / os.fsdecode(bytes(self._names[index]))

    def fingerprint(self) -> str:
        """Hash the relative names and file sizes of the listing."""
        digest = hashlib.sha256()
        for index, name in enumerate(self._names):
            size = self.path(index).stat().st_size
            digest.update(bytes(name) + b"\0" + str(size).encode() + b"\0")
        return f"sha256:{digest.hexdigest()}"


def require_image_folder(folder: str | Path) -> None:
    """Check that a folder holds at least one image, without listing all of it.

    Raises:
        DataError: If the folder is missing or holds no image.
    """
    if not Path(folder).is_dir():
        what = "is not a folder" if Path(folder).exists() else "does not exist"
        raise DataError(f"image folder {folder} {what}.")
    if next(_image_names(Path(folder)), None) is None:
        raise DataError(
            f"image folder {folder} holds no image.",
            f"Looked in all sub-folders for {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )


def read_image(path: Path) -> Image.Image:
    """Decode an image completely.

    Raises:
        UnreadableImage: If the file is missing, truncated or not an image; names it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableImage(
            f"image {path} cannot be read: {reason}.",
            "Replace or remove it; `kuea-mllm doctor --images FOLDER` lists all such files.",
        ) from error


def as_raised_in_worker(error: UnreadableImage) -> UnreadableImage:
    """Return the error without the traceback text that a DataLoader worker wraps around it."""
    if "Original Traceback" not in error.problem:
        return error
    # The last line of the traceback is "module.UnreadableImage: problem", then the remedy.
    problem, _, remedy = error.problem.rpartition("UnreadableImage: ")[2].partition("\n  ")
    return UnreadableImage(problem.strip(), remedy.strip())


def find_unreadable(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Decode every image below a folder on all cores; yield each path with its problem, or None."""
    listing = ImageFolder(folder, transform=_no_transform)

    def check(index: int) -> tuple[Path, str | None]:
        path = listing.path(index)
        try:
            read_image(path)
        except UnreadableImage as error:
            return path, error.problem
        return path, None

    # Threads are enough: Pillow decodes without holding the interpreter lock.
    with ThreadPool() as pool:
        yield from pool.imap(check, range(len(listing)), chunksize=16)


def _no_transform(image: Image.Image) -> Tensor:  # pragma: no cover - listings are not read
    raise TypeError("this listing is only used for its paths")


def _image_names(folder: Path) -> Iterator[str]:
    visited = set()
    # Links are followed: class folders of a data set are often links to another disk.
    for directory, subfolders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(directory)
        if real in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(real)
        relative = os.path.relpath(directory, folder)
        for name in files:
            # Plain strings: a Path for each of a million files would take ten times as long.
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
                yield name if relative == "." else f"{relative}{os.sep}{name}"


def _refuse(error: OSError) -> None:
    raise DataError(
        f"folder {error.filename} cannot be listed: {error.strerror}.",
        "Make it readable, or take it out of the image folder.",
    )
