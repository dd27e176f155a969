"""Images that lie in files of their own: below a folder, or named in a list."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image

from kuea_mllm.data.source import IMAGE_SUFFIXES, Names, has_image_suffix, read_image
from kuea_mllm.errors import DataError

# Stat calls wait for the disk or the network, not for a core.
_STAT_THREADS = 16


class FolderImages:
    """All images below a folder, in sorted order; sub-folders (classes) carry no meaning.

    Args:
        folder: Searched recursively; symbolic links are followed.

    Raises:
        DataError: If the folder is missing, holds no image, or a part of it cannot be listed.
    """

    def __init__(self, folder: str | Path) -> None:
        require_image_folder(folder)
        self.folder = Path(folder)
        self._root = os.fsencode(self.folder)
        self._names = Names([os.fsencode(name) for name in sorted(_image_names(self.folder))])
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Image.Image:
        """Decode one image completely."""
        return read_image(self.name(index))

    def name(self, index: int) -> str:
        """Return the file of one image."""
        return os.fsdecode(os.path.join(self._root, self._names[index]))  # noqa: PTH118 - bytes

    def fingerprint(self) -> str:
        """Hash the relative names and file sizes of the listing."""
        if self._fingerprint is None:
            sizes = _file_sizes(self.name(index) for index in range(len(self)))
            if (sizes < 0).any():
                gone = self.name(int(np.argmax(sizes < 0)))
                raise DataError(f"image {gone} was removed while the folder was being read.")
            self._fingerprint = hash_listing(self._names, sizes)
        return self._fingerprint


class ListedImages:
    """The images named in a text file, one path per line, in that order.

    Paths are absolute or relative to the folder of the list. Blank lines and lines that begin with
    `#` are skipped.

    Args:
        path: The list.

    Raises:
        DataError: If the list is missing, empty, or names a file that does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            text = self.path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise DataError(f"image list {path} cannot be read: {error.strerror}.") from error
        entries = [
            (number, line.strip())
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not entries:
            raise DataError(f"image list {path} names no image.", "Write one path on each line.")
        self._root = os.fsencode(self.path.absolute().parent)
        self._names = Names([line.encode("utf-8", errors="surrogateescape") for _, line in entries])
        self._sizes = _file_sizes(self.name(index) for index in range(len(entries)))
        missing = np.flatnonzero(self._sizes < 0)
        if len(missing):
            number, line = entries[int(missing[0])]
            more = f" ({len(missing)} such lines in all)" if len(missing) > 1 else ""
            raise DataError(
                f"image list {path}, line {number}: file {line} does not exist{more}.",
                f"Paths are absolute or relative to {self.path.absolute().parent}.",
            )

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Image.Image:
        """Decode one image completely."""
        return read_image(self.name(index))

    def name(self, index: int) -> str:
        """Return the file of one image."""
        return os.fsdecode(os.path.join(self._root, self._names[index]))  # noqa: PTH118 - bytes

    def fingerprint(self) -> str:
        """Hash the listed names and file sizes."""
        return hash_listing(self._names, self._sizes)


def require_image_folder(folder: str | Path) -> None:
    """Check that a folder holds at least one image, without listing all of it.

    Raises:
        DataError: If the folder is missing or holds no image.
    """
    if not Path(folder).is_dir():
        what = "is not a folder" if Path(folder).exists() else "does not exist"
        raise DataError(f"image folder {folder} {what}.")
    if not holds_an_image(folder):
        raise DataError(
            f"image folder {folder} holds no image.",
            f"Looked in all sub-folders for {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )


def holds_an_image(folder: str | Path) -> bool:
    """Whether any image file lies below a folder."""
    return next(_image_names(Path(folder)), None) is not None


def hash_listing(names: Iterable[bytes], sizes: np.ndarray) -> str:
    """Hash names with sizes, in order."""
    digest = hashlib.sha256()
    for name, size in zip(names, sizes, strict=True):
        digest.update(name + b"\0" + str(int(size)).encode() + b"\0")
    return f"sha256:{digest.hexdigest()}"


def _file_sizes(paths: Iterable[str]) -> np.ndarray:
    """Return the size of every file in bytes, -1 where there is no file."""
    with ThreadPool(_STAT_THREADS) as pool:
        return np.fromiter(pool.imap(_file_size, paths, chunksize=256), dtype=np.int64)


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a Path each would take ten times as long
    except OSError:
        return -1


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
            if has_image_suffix(name):
                yield name if relative == "." else f"{relative}{os.sep}{name}"


def _refuse(error: OSError) -> None:
    raise DataError(
        f"folder {error.filename} cannot be listed: {error.strerror}.",
        "Make it readable, or take it out of the image folder.",
    )
