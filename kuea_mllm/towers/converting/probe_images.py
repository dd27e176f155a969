"""A few fixed images on which towers are compared: drawn by rule, or the first of a folder.

They are the same everywhere and at every image size, so that a difference between two towers
is a number that can be repeated. Smooth fields, edges, textures and shapes: on noise alone every
tower says nearly the same of every image, and differences hide.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from kuea_mllm.errors import DataError
from kuea_mllm.towers.spec import TowerSpec

# Drawn once at this size and then resized, so that two image sizes see the same pictures.
_CANVAS = 336
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


def probe_pixels(spec: TowerSpec, *, images: Path | None = None, count: int = 16) -> Tensor:
    """Return the probe images of a tower.

    Args:
        spec: Image size, and how other images than squares are brought to it.
        images: Folder whose first readable images, by name, are taken instead of drawn ones.
        count: Number of images; a folder may hold fewer.

    Returns:
        Pixels in [0, 1], float32, (n, 3, image_size, image_size).

    Raises:
        DataError: If the folder is missing or holds no readable image.
    """
    if images is not None:
        return _read_folder(Path(images), spec, count)
    drawn = torch.stack([_draw(index) for index in range(count)])
    side = spec.image_size
    resized = F.interpolate(
        drawn, size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return resized.clamp(0, 1)


# Several comparisons follow each other in one command, all of them on these.
@functools.lru_cache(maxsize=16)
def _draw(index: int) -> Tensor:
    """Draw one picture, (3, _CANVAS, _CANVAS): a background with a texture and three shapes."""
    steps = (torch.arange(_CANVAS, dtype=torch.float32) + 0.5) / _CANVAS
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    angle = index * _GOLDEN_ANGLE
    along = right * math.cos(angle) + down * math.sin(angle)
    # A field of two colours that flow into each other, then stripes of a direction of their own.
    picture = _mix(_colour(index), _colour(index + 5), (torch.sin(2 * math.pi * along) + 1) / 2)
    across = right * math.sin(2 * angle) - down * math.cos(2 * angle)
    stripes = (torch.sin(2 * math.pi * (4 + 3 * (index % 5)) * across) + 1) / 2
    picture = picture * (0.65 + 0.35 * stripes)
    for part in range(3):
        turn = angle * (part + 2) + part
        x, y = right - 0.5 - 0.28 * math.cos(turn), down - 0.5 - 0.28 * math.sin(turn)
        inside = _distance((index + part) % 3, x, y, turn) < 0.09 + 0.05 * ((index + part) % 4)
        picture = torch.where(inside, _colour(3 * index + 7 * part + 2), picture)
    return picture.clamp(0, 1)


def _distance(kind: int, x: Tensor, y: Tensor, turn: float) -> Tensor:
    """Return how far points are from a centre, so that level sets are discs, squares, crosses."""
    if kind == 0:
        return torch.sqrt(x * x + y * y)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    if kind == 1:
        return torch.maximum(u.abs(), v.abs())
    # A cross: near to either axis, and not beyond its ends.
    return torch.maximum(torch.minimum(u.abs(), v.abs()) * 3, torch.maximum(u.abs(), v.abs()) * 0.8)


def _colour(index: int) -> Tensor:
    phases = torch.tensor([0.0, 2.1, 4.2])
    return (0.5 + 0.5 * torch.sin(1.7 * index + phases)).reshape(3, 1, 1)


def _mix(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return one * share + other * (1 - share)


def _read_folder(folder: Path, spec: TowerSpec, count: int) -> Tensor:
    if not folder.is_dir():
        raise DataError(f"probe images: there is no folder {folder}.")
    found: list[Tensor] = []
    for path in sorted(folder.iterdir()):
        if len(found) == count:
            break
        try:
            with Image.open(path) as image:
                found.append(_fit(image.convert("RGB"), spec))
        except (UnidentifiedImageError, OSError):
            # Folders hold other files as well; only images count.
            continue
    if not found:
        raise DataError(
            f"probe images: {folder} holds no readable image.", "Give a folder of pictures."
        )
    return torch.stack(found)


def _fit(image: Image.Image, spec: TowerSpec) -> Tensor:
    side = spec.image_size
    width, height = (float(length) for length in image.size)
    box = (0.0, 0.0, width, height)
    if spec.resize == "shortest_edge":
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
    resized = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    pixels = np.array(resized).transpose(2, 0, 1)  # (3, side, side)
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32) / 255
