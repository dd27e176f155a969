"""Use a tower at another resolution, the way open_clip does."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.model.tower import Tower, build_model

METHOD = "bicubic with antialias, as open_clip resizes"
_KEPT = "kept as they are, for as many patches as before"

_POSITIONS = "embeddings.position_embedding.weight"


def resize_position_embedding(weight: Tensor, grid_to: int, *, prefix_tokens: int = 1) -> Tensor:
    """Resize a square grid of position embeddings.

    Bicubic with antialias, as open_clip resizes while loading a checkpoint. The
    `interpolate_pos_encoding` of transformers' CLIP has no antialias: with it PyTorch's bicubic
    uses a = -0.5 instead of -0.75, so the two differ even when enlarging.

    Args:
        weight: Position embeddings, (prefix_tokens + grid * grid, width), patches row-major.
        grid_to: Patches per side to make.
        prefix_tokens: Rows in front of the patches that are copied: 1 for the class token of CLIP,
            0 for SigLIP.

    Returns:
        Position embeddings, (prefix_tokens + grid_to * grid_to, width), in the dtype of `weight`.

    Raises:
        TowerError: If the patch rows form no square or `grid_to` is below 1.
    """
    grid = math.isqrt(max(len(weight) - prefix_tokens, 0))
    if grid < 1 or grid * grid != len(weight) - prefix_tokens or grid_to < 1:
        raise TowerError(
            f"position embeddings of {len(weight)} rows ({prefix_tokens} of them no patches) "
            f"cannot be resized to {grid_to} x {grid_to}."
        )
    if grid == grid_to:
        return weight.clone()
    # Half precision has no antialiased kernel on every device.
    wide = weight[prefix_tokens:].to(torch.promote_types(weight.dtype, torch.float32))
    image = wide.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)  # (1, width, grid, grid)
    resized = F.interpolate(
        image, size=(grid_to, grid_to), mode="bicubic", align_corners=False, antialias=True
    )
    rows = resized.permute(0, 2, 3, 1).reshape(grid_to * grid_to, -1)
    return torch.cat([weight[:prefix_tokens], rows.to(weight.dtype)])


def resize_method(tower: Tower, image_size: int) -> str:
    """Say in words what `resize_tower` does to the position embeddings."""
    return _KEPT if image_size // tower.spec.patch_size == tower.spec.grid else METHOD


def _near_multiple(size: int, patch_size: int) -> int:
    return max(1, round(size / patch_size)) * patch_size


def resize_tower(tower: Tower, image_size: int) -> Tower:
    """Return a copy of a tower for another image size; the tower itself stays as it is.

    Args:
        tower: The tower.
        image_size: New side of the image in pixels: a multiple of the patch size, or one that
            gives as many patches as now. The latter is for towers such as SigLIP's 384 pixels
            with patches of 14, whose size no checkpoint file states.

    Raises:
        TowerError: If `image_size` is neither.
    """
    keeps_grid = image_size // tower.spec.patch_size == tower.spec.grid
    if image_size < 1 or (image_size % tower.spec.patch_size and not keeps_grid):
        raise TowerError(
            f"image size {image_size} is no multiple of the patch size {tower.spec.patch_size}.",
            f"Give one, such as {_near_multiple(image_size, tower.spec.patch_size)}.",
        )
    spec = replace(tower.spec, image_size=image_size)
    state = tower.canonical_state()
    state[_POSITIONS] = resize_position_embedding(
        state[_POSITIONS], spec.grid, prefix_tokens=spec.prefix_tokens
    )
    model = build_model(spec, state, where=tower.source, dtype=None)
    return Tower(model, spec, tower.source, tower.layout, tower.manifest)
