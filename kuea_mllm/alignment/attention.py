"""Where the tower looks, before and after: the data behind the paper's Figure 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kuea_mllm.towers.model.attention import attention_maps
from kuea_mllm.towers.model.tower import Tower

PICTURES = 6


class AttentionRecord:
    """Attention of the last block on a few held-out images, mean over heads.

    Args:
        tower: The student, still untouched.
        images: As the tower sees them, uint8, (n, size, size, 3).
    """

    def __init__(self, tower: Tower, images: NDArray[np.uint8]) -> None:
        self._tower = tower
        self._images = images
        self._original = self._maps()

    def save(self, path: Path) -> None:
        """Write `images`, `original` and `aligned`, (n, grid, grid) each, as the tower is now."""
        np.savez_compressed(
            path, images=self._images, original=self._original, aligned=self._maps()
        )

    def _maps(self) -> NDArray[np.float32]:
        weight = next(self._tower.model.parameters())
        pixels = torch.from_numpy(self._images).permute(0, 3, 1, 2)
        # A compiled tower would run past the hooks that catch queries and keys.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            maps = attention_maps(self._tower, pixels.to(weight.device, torch.float32) / 255)
        found: NDArray[np.float32] = maps.float().mean(1).cpu().numpy()
        return found
