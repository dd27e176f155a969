"""Where two towers look on the same pictures: maps to draw, and numbers over more of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kuea_mllm.data.source import ImageSource
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import TowerMismatch
from kuea_mllm.towers.model.attention import attention_maps
from kuea_mllm.towers.model.tower import Tower


@dataclass(frozen=True)
class AttentionView:
    """Attention of the last block (SigLIP: of the pooling head), mean over heads.

    Attributes:
        positions: Images that are drawn.
        images: They as the towers see them, uint8, (drawn, size, size, 3).
        original: Their maps under the reference tower, (drawn, grid, grid), float32.
        aligned: Their maps under the tower that is looked at.
        numbers: Over all images asked for; see `compare_attention`.
    """

    positions: list[int]
    images: NDArray[np.uint8]
    original: NDArray[np.float32]
    aligned: NDArray[np.float32]
    numbers: dict[str, float]


def compare_attention(
    original: Tower,
    tower: Tower,
    images: ImageSource,
    positions: Sequence[int],
    *,
    drawn: Sequence[int],
    device: str = "cpu",
    batch_size: int = 32,
) -> AttentionView:
    """Compare where two towers look; only the maps of the drawn images are kept.

    Args:
        original: The reference; moved to `device`.
        tower: The tower that is looked at; likewise.
        images: The listing.
        positions: Images that the numbers are about.
        drawn: Images whose maps are kept.
        device: Where to compute.
        batch_size: Images at once.

    Returns:
        The maps; `numbers` holds `images`, `cosine_mean` (of the two maps of an image),
        `spread_original` and `spread_aligned` (entropy of a map over that of an even one, mean
        over images: 1 looks everywhere, 0 at one patch).

    Raises:
        TowerMismatch: If the towers do not have the same patches.
    """
    require_same_patches(original, tower)
    for each in (original, tower):
        each.model.to(device)  # type: ignore[arg-type]
    sums = {"cosine_mean": 0.0, "spread_original": 0.0, "spread_aligned": 0.0}
    for before, after, _ in _maps(original, tower, images, positions, device, batch_size):
        flat = before.flatten(1), after.flatten(1)
        sums["cosine_mean"] += float(torch.cosine_similarity(*flat).sum())
        sums["spread_original"] += float(_spread(flat[0]).sum())
        sums["spread_aligned"] += float(_spread(flat[1]).sum())
    kept = list(_maps(original, tower, images, drawn, device, batch_size))
    shown = [torch.cat(parts).numpy() for parts in zip(*kept, strict=True)]
    count = len(positions)
    return AttentionView(
        positions=list(drawn),
        images=shown[2],
        original=shown[0],
        aligned=shown[1],
        numbers={"images": float(count), **{key: value / count for key, value in sums.items()}},
    )


def require_same_patches(original: Tower, tower: Tower) -> None:
    """Refuse two towers whose patches do not lie in the same places.

    Raises:
        TowerMismatch: Naming both.
    """
    first, second = (_patches_of(each) for each in (tower, original))
    if first != second:
        raise TowerMismatch(
            f"{tower.source} takes {first}, {original.source} {second}: their attention cannot be "
            "compared patch by patch.",
            "Give --against the tower that it was made from.",
        )


def _patches_of(tower: Tower) -> str:
    spec = tower.spec
    return f"{spec.image_size} px ({spec.resize}) in patches of {spec.patch_size}"


def _maps(
    original: Tower,
    tower: Tower,
    images: ImageSource,
    positions: Sequence[int],
    device: str,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield maps under both towers, (n, grid, grid), and pixels, uint8, (n, size, size, 3)."""
    transform = ImageTransform.from_spec(tower.spec)
    for start in range(0, len(positions), batch_size):
        chosen = positions[start : start + batch_size]
        pixels = torch.from_numpy(
            np.stack([transform.to_uint8(images.read(position)) for position in chosen])
        )
        unit = pixels.to(device, torch.float32) / 255
        found: list[Any] = [
            attention_maps(each, unit).float().mean(1).cpu() for each in (original, tower)
        ]
        yield found[0], found[1], pixels.permute(0, 2, 3, 1).contiguous()


def _spread(maps: Tensor) -> Tensor:
    share = maps / maps.sum(1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    entropy = torch.special.entr(share).sum(1)
    spread: Tensor = entropy / np.log(maps.shape[1]) if maps.shape[1] > 1 else entropy
    return spread
