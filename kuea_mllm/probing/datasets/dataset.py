"""One split of a labelled or captioned data set, wherever its images lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kuea_mllm.data.source import ImageSource, Names, read_image
from kuea_mllm.errors import DataError

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ProbeDataset:
    """Images with labels, captions or both.

    Attributes:
        name: Heading of its columns, such as "CIFAR10".
        split: Which part of the data set.
        images: The pictures, by position.
        source: Where it lies.
        labels: Class of every image, (images,); None without classes.
        class_names: Name of every class.
        templates: Prompts with `{c}` for a class name.
        captions: Captions of every image; None without.
    """

    name: str
    split: str
    images: ImageSource
    source: str
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    captions: tuple[tuple[str, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def total(self) -> int:
        """Images of the whole split, of which a limit may have left only some."""
        return total_count(self.images)

    @property
    def fingerprint(self) -> str:
        """Hash of images (names and sizes), labels, class names, templates and captions."""
        labels = None if self.labels is None else self.labels.tolist()
        parts = [self.images.fingerprint(), labels, self.class_names, self.templates, self.captions]
        return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"

    def image_name(self, index: int) -> str:
        """Return the name of an image inside of its data set, the same wherever a copy lies."""
        return self.images.name(index).removeprefix(f"{self.source}/")

    def require_labels(self) -> Labels:
        """Return the labels.

        Raises:
            DataError: If there are none.
        """
        if self.labels is None:
            raise DataError(
                f"data set {self.name} ({self.source}) has no labels.",
                "Give one whose images have classes.",
            )
        return self.labels

    def require_captions(self) -> tuple[tuple[str, ...], ...]:
        """Return the captions of every image.

        Raises:
            DataError: If there are none.
        """
        if self.captions is None:
            raise DataError(
                f"data set {self.name} ({self.source}) has no captions.",
                "Give one for retrieval, whose images have captions.",
            )
        return self.captions

    def limited(self, count: int) -> ProbeDataset:
        """Return the same with `count` of its images, spread evenly over the listing."""
        if count >= len(self):
            return self
        chosen = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        captions = self.captions
        return replace(
            self,
            images=SomeImages(self.images, chosen),
            labels=None if self.labels is None else self.labels[chosen],
            captions=None if captions is None else tuple(captions[i] for i in chosen.tolist()),
        )


class SomeImages:
    """Some images of a listing.

    Args:
        images: The whole listing.
        positions: Which of them, in any order.
    """

    def __init__(self, images: ImageSource, positions: NDArray[np.int64]) -> None:
        self._images, self._positions = images, positions

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def total(self) -> int:
        """Images of the whole listing."""
        return total_count(self._images)

    def read(self, index: int) -> Image.Image:
        """Decode one image completely."""
        return self._images.read(int(self._positions[index]))

    def name(self, index: int) -> str:
        """Return where one image lies."""
        return self._images.name(int(self._positions[index]))

    def fingerprint(self) -> str:
        """Hash the listing's fingerprint and the positions."""
        digest = hashlib.sha256(self._images.fingerprint().encode())
        digest.update(self._positions.astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"


def total_count(images: ImageSource) -> int:
    """Return how many images a listing has, before some of them were chosen."""
    return images.total if isinstance(images, SomeImages) else len(images)


class PathImages:
    """Images that a caption or label file names, in its order.

    Args:
        folder: What the names are relative to.
        names: Relative paths.
        named_by: The file that names them, for errors.

    Raises:
        DataError: If a file does not exist; says which and how many.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, named_by: str) -> None:
        self._folder = folder
        self._names = Names([name.encode("utf-8", errors="surrogateescape") for name in names])
        sizes = [_size(folder / name) for name in names]
        missing = [name for name, size in zip(names, sizes, strict=True) if size < 0]
        if missing:
            raise DataError(
                f"{named_by} names image {missing[0]}, which is not in {folder} ({len(missing)} of "
                f"{len(names)} images are missing).",
                "Complete the images, or give the folder that they lie in.",
            )
        self._sizes = np.array(sizes, dtype="<i8")

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Image.Image:
        """Decode one image completely."""
        return read_image(self.name(index))

    def name(self, index: int) -> str:
        """Return the file of one image."""
        return str(self._folder / self._names[index].decode("utf-8", errors="surrogateescape"))

    def fingerprint(self) -> str:
        """Hash the relative names and file sizes."""
        digest = hashlib.sha256(self._names.ends.astype("<i8").tobytes())
        digest.update(self._names.text.tobytes() + self._sizes.tobytes())
        return f"sha256:{digest.hexdigest()}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
