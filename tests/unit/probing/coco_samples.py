"""A tiny COCO with label maps, in the layout of the release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RED, BLUE = 0, 155  # stored: person, and sea less one


def write_pair(
    folder: Path, split: str, name: str, pixels: NDArray[np.uint8], stored: NDArray[np.uint8]
) -> None:
    """Write a picture (height, width, 3) and what its label map stores (height, width)."""
    images, labels = folder / "images" / f"{split}2017", folder / "annotations" / f"{split}2017"
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(images / f"{name}.png")
    Image.fromarray(stored).save(labels / f"{name}.png")


def write_colours(folder: Path, split: str, count: int, *, side: int = 16, seed: int = 0) -> None:
    """Write pictures whose quarters are red (person) or blue (sea), with maps that say so."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        quarters = generator.integers(0, 2, (2, 2))
        is_blue = np.kron(quarters, np.ones((side // 2, side // 2), dtype=int)).astype(bool)
        pixels = np.zeros((side, side, 3), dtype=np.uint8)
        pixels[..., 0] = np.where(is_blue, 20, 230)
        pixels[..., 2] = np.where(is_blue, 230, 20)
        noise = generator.integers(0, 20, pixels.shape)
        stored = np.where(is_blue, BLUE - 1, RED).astype(np.uint8)
        write_pair(folder, split, f"{number:012d}", (pixels + noise).astype(np.uint8), stored)
