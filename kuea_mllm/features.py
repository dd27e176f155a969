"""What a vision model gives for a batch of images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Features(NamedTuple):
    """Output of one vision model for a batch.

    A tuple, so that wrappers which look into outputs (distributed data parallel) see the tensors.

    Attributes:
        pooled: One embedding per image, (n, width), not normalised.
        patches: Patch tokens without class token and registers, (n, grid * grid, token width),
            row-major; None where nobody asked for them.
    """

    pooled: Tensor
    patches: Tensor | None = None


def resample_patches(patches: Tensor, count: int) -> Tensor:
    """Resample square grids of patch tokens to another number of patches (bicubic, antialias).

    Args:
        patches: Tokens, (n, grid * grid, width), row-major.
        count: Patches wanted, a square number.

    Returns:
        Tokens, (n, count, width), in the same dtype; the same tensor if nothing changes.

    Raises:
        ValueError: If a grid is not square.
    """
    if patches.shape[1] == count:
        return patches
    old, new = math.isqrt(patches.shape[1]), math.isqrt(count)
    if old * old != patches.shape[1] or new * new != count:
        raise ValueError(f"{patches.shape[1]} or {count} patches are no square grid")
    wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
    grid = wide.transpose(1, 2).reshape(len(wide), -1, old, old)  # (n, width, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return grid.flatten(2).transpose(1, 2).to(patches.dtype)
