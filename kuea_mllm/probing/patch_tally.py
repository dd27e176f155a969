"""Counts of patch probing: what a head found in each picture, and the recall that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tally:
    """What a head found in each validation picture.

    Attributes:
        hits: Patches (or the picture) that hold a class and of which it was said, (n, classes).
        positives: Patches (or the picture) that hold it, (n, classes).
        claimed: Whether it was said of any of them, (n, classes).
    """

    hits: NDArray[np.int32]
    positives: NDArray[np.int32]
    claimed: NDArray[np.bool_]

    @property
    def macro_recall(self) -> float:
        """Mean recall of the classes that some picture holds, in percent."""
        hits, positives = self.hits.sum(0), self.positives.sum(0)
        is_there = positives > 0
        return float(100 * (hits[is_there] / positives[is_there]).mean())


@torch.no_grad()
def tally(logits: Tensor, flags: Tensor) -> Tally:
    """Count what a head found in each picture of a batch.

    Args:
        logits: (n, patches or 1, classes); a class is claimed above 0, where the sigmoid is above
            one half.
        flags: Whether a patch holds a class, of the same shape.
    """
    claimed = logits > 0
    counts = ((claimed & flags).sum(1), flags.sum(1), claimed.any(1))
    hits, positives, said = (count.cpu().numpy() for count in counts)
    return Tally(hits.astype(np.int32), positives.astype(np.int32), said)


def join(tallies: Sequence[Tally]) -> Tally:
    """Return the tally of all pictures of several batches."""
    fields = [field.name for field in dataclasses.fields(Tally)]
    return Tally(*(np.concatenate([getattr(part, name) for part in tallies]) for name in fields))
