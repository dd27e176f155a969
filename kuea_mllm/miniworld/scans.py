"""The handwritten digits behind every image, in a fixed split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuea_mllm.errors import DataError

SPLIT_SIZES = {"train": 1197, "validation": 200, "test": 400}
SCAN_SIDE = 8
# Part of the world's definition: another value is another world, with other checkpoints.
_SPLIT_SEED = 20250101


@dataclass(frozen=True)
class Scans:
    """The scans of one split.

    Attributes:
        pixels: Ink in [0, 1], float32, (n, 8, 8).
        labels: Digit classes, int64, (n,).
        sources: Row of each scan in scikit-learn's data set, int64, (n,).
    """

    pixels: NDArray[np.float32]
    labels: NDArray[np.int64]
    sources: NDArray[np.int64]

    def of_digit(self, digit: int) -> NDArray[np.int64]:
        """Return the rows that show `digit`."""
        return np.flatnonzero(self.labels == digit)


@cache
def load_scans(split: str) -> Scans:
    """Load scikit-learn's bundled 8x8 digits of one split.

    The split is stratified by class and never changes, so that a picture of a held-out scan is
    new to every model that was built from the training scans.

    Args:
        split: "train" (1,197 scans), "validation" (200) or "test" (400).

    Raises:
        DataError: If there is no such split.
    """
    if split not in SPLIT_SIZES:
        raise DataError(f"split {split!r} does not exist; choose from {', '.join(SPLIT_SIZES)}.")
    pixels, labels, rows = _split_rows()
    chosen = rows[split]
    return Scans(pixels[chosen], labels[chosen], chosen)


@cache
def _split_rows() -> tuple[NDArray[np.float32], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    labels = digits.target.astype(np.int64)
    rng = np.random.default_rng(_SPLIT_SEED)
    # A random place inside its class, as a fraction: sorting by it deals every class out evenly.
    place = np.empty(len(labels))
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(place, kind="stable")
    ends = np.cumsum([SPLIT_SIZES["test"], SPLIT_SIZES["validation"]])
    test, validation, train = np.split(order, ends)
    rows = {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}
    return (digits.images / 16).astype(np.float32), labels, rows
