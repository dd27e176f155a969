"""Images as a PyTorch data set of uint8 pixels, with checksums and reproducible randomness."""

from __future__ import annotations

import zlib
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kuea_mllm.data.augment import Augment, maybe_flip, random_resized_crop, random_stream
from kuea_mllm.data.source import ImageSource
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.data.unreadable import SkipPolicy, too_many_unreadable
from kuea_mllm.errors import DataError, UnreadableImage


class PixelItem(TypedDict):
    """One item of an `ImageDataset`.

    Attributes:
        pixels: uint8, (3, size, size).
        index: Position of the image in its source; -1 in streams.
        checksum: CRC-32 of the pixel bytes.
        replaced: Only where unreadable images are skipped: the position of the image that this one
            stands in for, or -1.
    """

    pixels: Tensor
    index: int
    checksum: int
    replaced: NotRequired[int]


@runtime_checkable
class PixelSource(Protocol):
    """A source that holds pixels which are transformed already (a pack)."""

    def pixels(self, index: int) -> np.ndarray:
        """Return a writable copy of one image, uint8, (3, size, size)."""
        ...

    def require_transform(self, transform: ImageTransform) -> None:
        """Check that the pixels were made by this transform.

        Raises:
            DataError: If they were not.
        """
        ...


class ImageDataset(Dataset[PixelItem]):
    """A source of images and what is done to them.

    Indexed by draw: `draw = epoch * len(source) + position`, so that random transforms differ from
    epoch to epoch and are still a pure function of (seed, draw), whichever worker computes them.

    Args:
        source: Where the images come from.
        transform: What the tower expects.
        augment: Random transform: "flip" mirrors half of the draws; "random_resized_crop" takes
            at least half of the picture instead of its centre.
        seed: Of the random transform.
        skip: What to do about unreadable images; None raises at the first one.

    Raises:
        DataError: If the source is a pack of other crops, or of crops and `augment` needs whole
            pictures.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: ImageTransform,
        *,
        augment: Augment = "none",
        seed: int = 0,
        skip: SkipPolicy | None = None,
    ) -> None:
        if isinstance(source, PixelSource):
            source.require_transform(transform)
            if augment == "random_resized_crop":
                raise DataError(
                    "data.augment=random_resized_crop needs whole pictures, and a pack only holds "
                    "their centres.",
                    "Point data.images at the images that the pack was made from.",
                )
        self.source = source
        self.transform = transform
        self.augment: Augment = augment
        self.seed = seed
        self.skip = skip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: int) -> PixelItem:
        draw = int(draw)
        if draw < 0:
            raise IndexError(f"draw {draw} is negative")
        position = draw % len(self.source)
        if self.skip is None or self.skip.limit == 0:
            return make_item(self._pixels(position, draw), position)
        return self._readable(position, draw, self.skip)

    def _readable(self, position: int, draw: int, skip: SkipPolicy) -> PixelItem:
        """Return the image, or the next one that can be read."""
        tried: list[int] = []
        for candidate in skip.candidates(position, len(self.source)):
            try:
                item = make_item(self._pixels(candidate, draw), candidate)
            except UnreadableImage as error:
                tried.append(candidate)
                if len(tried) > skip.limit:
                    names = [self.source.name(each) for each in tried]
                    raise too_many_unreadable(len(tried), skip.limit, names) from error
                continue
            item["replaced"] = -1 if candidate == position else position
            return item
        raise DataError(f"none of the {len(self.source)} images can be read.")

    def _pixels(self, position: int, draw: int) -> np.ndarray:
        if isinstance(self.source, PixelSource):
            pixels = self.source.pixels(position)
        else:
            image = self.source.read(position)
            if self.augment != "none":
                return augmented(image, self.transform, self.augment, self.seed, draw)
            return self.transform.to_uint8(image)
        if self.augment == "flip":
            return maybe_flip(pixels, random_stream(self.seed, draw))
        return pixels


def augmented(
    image: Image.Image, transform: ImageTransform, augment: Augment, seed: int, draw: int
) -> np.ndarray:
    """Apply a transform with its random part, uint8, (3, size, size)."""
    if augment == "random_resized_crop":
        return random_resized_crop(image, transform, random_stream(seed, draw))
    pixels = transform.to_uint8(image)
    return maybe_flip(pixels, random_stream(seed, draw)) if augment == "flip" else pixels


def make_item(pixels: np.ndarray, index: int) -> PixelItem:
    """Return the item of contiguous uint8 pixels, (3, size, size)."""
    return {
        "pixels": torch.from_numpy(pixels),
        "index": index,
        "checksum": zlib.crc32(pixels.data),
    }
