"""From a picture to the pixels that student, original and teacher share.

Normalisation is not part of it: every model applies its own (see `towers.model.encode`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kuea_mllm.towers.spec import Resize, TowerSpec


@dataclass(frozen=True)
class ImageTransform:
    """open_clip's evaluation transform without its final normalisation; no augmentation.

    Attributes:
        image_size: Side of the square result in pixels.
        resize: "shortest_edge" resizes the shorter side and crops the centre; "squash" resizes both
            sides and distorts (SigLIP).
    """

    image_size: int
    resize: Resize = "shortest_edge"

    @classmethod
    def from_spec(cls, spec: TowerSpec) -> ImageTransform:
        """Return the transform that a tower was trained with."""
        return cls(spec.image_size, spec.resize)

    @property
    def fingerprint(self) -> str:
        """A name that changes whenever the pixels would: part of the key of cached features."""
        return f"pil-bicubic-v1:{self.resize}:{self.image_size}"

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one picture.

        Args:
            image: A picture of any mode and size.

        Returns:
            Pixels in [0, 1], float32, (3, image_size, image_size).
        """
        return torch.from_numpy(self.to_uint8(image)).to(torch.float32) / 255

    def to_uint8(self, image: Image.Image) -> np.ndarray:
        """Transform one picture without the division by 255 that `__call__` ends with.

        Args:
            image: A picture of any mode and size.

        Returns:
            Pixels in 0..255, uint8, (3, image_size, image_size), contiguous and writable.
        """
        return to_channels_first(self._resized(resizable(image)))

    def _resized(self, image: Image.Image) -> Image.Image:
        side = self.image_size
        if self.resize == "squash":
            return image.resize((side, side), Image.Resampling.BICUBIC)
        width, height = image.size
        # The longer side is cut off, not rounded, as torchvision does.
        if width <= height:
            width, height = side, int(side * height / width)
        else:
            width, height = int(side * width / height), side
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return image.crop((left, top, left + side, top + side))


def resizable(image: Image.Image) -> Image.Image:
    """Return the picture in a mode that Pillow can resize smoothly."""
    if image.mode in {"P", "1"}:
        # Pillow resizes these by nearest neighbour, whatever it is asked for. By way of RGBA,
        # because it warns about palettes with transparency otherwise.
        return image.convert("RGBA").convert("RGB")
    return image


def to_channels_first(image: Image.Image) -> np.ndarray:
    """Return the pixels of a picture, uint8, (3, height, width), contiguous and writable."""
    # Converted after resizing, as open_clip does. An alpha channel is dropped, not blended.
    pixels = np.asarray(image.convert("RGB"))  # (height, width, 3)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def unit_pixels(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1]; whole bytes travel from the decoding processes to the device."""
    return pixels if pixels.is_floating_point() else pixels.to(torch.float32) / 255
