"""Random transforms that are a pure function of (seed, draw): no state to save or to lose."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image

from kuea_mllm.data.transforms import ImageTransform, resizable, to_channels_first

Augment = Literal["none", "flip", "random_resized_crop"]

CROP_SCALE = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# As in torchvision: a box that does not fit is drawn again, then the centre is taken.
_CROP_TRIES = 10


def random_stream(seed: int, draw: int) -> np.random.Generator:
    """Return the random numbers of one draw, whichever process asks and in whatever order."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, draw])))


def random_resized_crop(
    image: Image.Image, transform: ImageTransform, numbers: np.random.Generator
) -> np.ndarray:
    """Cut out a random part of the picture and resize it, bicubic.

    Args:
        image: A picture of any mode and size.
        transform: Gives the side of the result.
        numbers: Source of randomness.

    Returns:
        Pixels, uint8, (3, image_size, image_size).
    """
    image = resizable(image)
    left, top, width, height = crop_box(image.size, numbers)
    side = transform.image_size
    part = image.crop((left, top, left + width, top + height))
    return to_channels_first(part.resize((side, side), Image.Resampling.BICUBIC))


def crop_box(size: tuple[int, int], numbers: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a box that covers CROP_SCALE of the area at an aspect within CROP_RATIO.

    Args:
        size: Width and height of the picture.
        numbers: Source of randomness.

    Returns:
        Left, top, width and height; the box lies inside the picture.
    """
    width, height = size
    for _ in range(_CROP_TRIES):
        area = width * height * numbers.uniform(*CROP_SCALE)
        # Drawn on a logarithmic scale: 3/4 is as likely as 4/3.
        ratio = math.exp(numbers.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(numbers.integers(0, width - box_width + 1))
            top = int(numbers.integers(0, height - box_height + 1))
            return left, top, box_width, box_height
    low, high = CROP_RATIO
    box_width = max(1, min(width, round(height * high)))
    box_height = max(1, min(height, round(width / low)))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def maybe_flip(pixels: np.ndarray, numbers: np.random.Generator) -> np.ndarray:
    """Mirror pixels, (3, height, width), left to right in half of the draws."""
    if numbers.random() < 0.5:
        return np.ascontiguousarray(pixels[:, :, ::-1])
    return pixels
