"""Choose a part of the images, the same part on every machine."""

from __future__ import annotations

import math

import numpy as np

from kuea_mllm.errors import DataError


def select_positions(
    n: int,
    *,
    fraction: float | None,
    count: int | None,
    seed: int,
    exclude: np.ndarray | None = None,
) -> np.ndarray:
    """Draw positions at random; a smaller selection is part of every larger one of the same seed.

    Args:
        n: Number of images.
        fraction: Part of the images that are not excluded, in (0, 1]; rounded down, at least one.
        count: Number of images instead; both None takes all.
        seed: Of the draw.
        exclude: Positions that must not be drawn (held-out images).

    Returns:
        Positions, int64, sorted.

    Raises:
        DataError: If fewer than `count` images are left.
    """
    if fraction is not None and count is not None:
        raise ValueError("give fraction or count, not both")
    allowed = np.ones(n, dtype=bool)
    if exclude is not None:
        allowed[np.asarray(exclude, dtype=np.int64)] = False
    available = int(allowed.sum())
    if count is not None and count > available:
        raise DataError(
            f"data.count asks for {count} images, but only {available} can be trained on."
        )
    if fraction is not None:
        # Tolerates what binary fractions lose: 0.29 * 100 is 28.999...
        count = max(1, math.floor(fraction * available + 1e-9)) if available else 0
    if count is None or count == available:
        return np.flatnonzero(allowed).astype(np.int64)
    # One order of all positions, whatever is excluded and however many are taken.
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    return np.sort(order[allowed[order]][:count]).astype(np.int64)
