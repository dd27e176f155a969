"""Scores as functions of how often each cluster is counted.

The clusters of a test set (images, pairs of images) are what a bootstrap draws with replacement. A
score is computed from a few sums per cluster, so that large test sets stay cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


class Measure(Protocol):
    """A score that can be computed for any number of copies of each cluster."""

    @property
    def width(self) -> int:
        """Numbers that are held for each draw."""
        ...

    @property
    def sums(self) -> Array:
        """What each cluster contributes, (clusters, numbers); equal where nothing differs."""
        ...

    def values(self, weights: Array) -> Array:
        """Return the score for each row of `weights`, (draws, clusters); NaN where undefined."""
        ...

    def influences(self) -> Array:
        """Return how much each cluster pulls the score (first order), (clusters,); sums to 0."""
        ...


@dataclass(frozen=True)
class RatioMeasure:
    """The mean over groups of a ratio of sums; all statistics but the ROC-AUC are one.

    Attributes:
        numerators: Sum per cluster and group, (clusters, groups).
        denominators: What it is divided by, (clusters, groups).
        factor: The highest score.
    """

    numerators: Array
    denominators: Array
    factor: float = 1.0

    @property
    def width(self) -> int:
        """One weight per cluster."""
        return len(self.numerators)

    @property
    def sums(self) -> Array:
        """Numerators and denominators of each cluster."""
        return np.concatenate([self.numerators, self.denominators], axis=1)

    def values(self, weights: Array) -> Array:
        """Return the score for each row of weights; groups that were not drawn are left out."""
        tops, bottoms = weights @ self.numerators, weights @ self.denominators
        is_there = bottoms > 0.0
        ratios = np.divide(tops, bottoms, out=np.zeros_like(tops), where=is_there)
        count = is_there.sum(axis=1)
        found: Array = np.full(len(weights), np.nan)
        np.divide(self.factor * ratios.sum(axis=1), count, out=found, where=count > 0)
        return found

    def influences(self) -> Array:
        """Return the linear effect of one more copy of each cluster."""
        tops, bottoms = self.numerators.sum(axis=0), self.denominators.sum(axis=0)
        used = bottoms > 0.0
        if not used.any():
            return np.zeros(len(self.numerators))
        slopes = self.numerators[:, used] - self.denominators[:, used] * (tops / bottoms)[used]
        found: Array = self.factor * (slopes / bottoms[used]).mean(axis=1)
        return found


@dataclass(frozen=True)
class AucMeasure:
    """The area under the ROC curve: how often a positive outranks a negative (ties count half).

    Attributes:
        starts: How many documents score lower than each, in the order of the scores, (n,).
        ends: How many score as high or lower, (n,).
        members: Cluster of each document in that order, (n,).
        is_positive: 1 for a document of the positive class, in that order, (n,).
        clusters: Number of clusters.
        factor: The highest score.
    """

    starts: Codes
    ends: Codes
    members: Codes
    is_positive: Array
    clusters: int
    factor: float = 1.0

    @property
    def width(self) -> int:
        """Several sums per document."""
        return 8 * max(len(self.members), self.clusters)

    @property
    def sums(self) -> Array:
        """The ranks of each cluster's documents, summed."""
        ranks = (self.starts + self.ends).astype(np.float64)
        found = np.bincount(self.members, weights=ranks, minlength=self.clusters)
        return found.astype(np.float64)[:, None]

    def values(self, weights: Array) -> Array:
        """Return the area for each row of weights; NaN where one class was not drawn."""
        copies = weights[:, self.members]  # (draws, n), in the order of the scores
        positives = copies * self.is_positive
        below, ties = self._negatives(copies - positives)
        won = (positives * (below + 0.5 * ties)).sum(axis=1)
        pairs = positives.sum(axis=1) * (copies - positives).sum(axis=1)
        found: Array = np.full(len(weights), np.nan)
        np.divide(self.factor * won, pairs, out=found, where=pairs > 0)
        return found

    def influences(self) -> Array:
        """Return the structural components (DeLong) of each cluster."""
        negatives = 1.0 - self.is_positive
        many, few = float(self.is_positive.sum()), float(negatives.sum())
        below, ties = self._negatives(negatives[None, :])
        own, equal = self._negatives(self.is_positive[None, :])
        placed = (below + 0.5 * ties)[0] / few
        beaten = 1.0 - (own + 0.5 * equal)[0] / many
        area = float((placed * self.is_positive).sum() / many)
        parts = self.is_positive * (placed - area) / many + negatives * (beaten - area) / few
        found = np.bincount(self.members, weights=parts, minlength=self.clusters)
        return self.factor * found.astype(np.float64)

    def _negatives(self, weights: Array) -> tuple[Array, Array]:
        """Return the weight of what ranks lower than each document, and of what ranks equal."""
        padding = np.zeros((len(weights), 1))
        sums = np.concatenate([padding, np.cumsum(weights, axis=1)], axis=1)
        below = sums[:, self.starts]
        return below, sums[:, self.ends] - below
