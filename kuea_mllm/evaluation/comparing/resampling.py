"""Drawing clusters with replacement: how a difference of scores varies (numpy and scipy only)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from kuea_mllm.evaluation.measures import Array, Measure, RatioMeasure

LEVEL = 0.95
ROUNDING = 1e-12
# Weights that are held at once: 2**22 of 8 bytes and what is made of them, ~100 MB.
_WEIGHTS_AT_ONCE = 2**22
# Clusters that contribute the same are drawn together where they are this many times fewer kinds;
# a multinomial draw of a kind costs about as much as ten draws of a cluster.
_KINDS = 10


@dataclass(frozen=True)
class Stratum:
    """Runs of two systems on the same clusters, paired in order.

    Attributes:
        baseline: Score of each run of the first system.
        candidate: Score of each run of the second system.
        clusters: Clusters of the documents.
        samples: Documents.
        names: What the clusters are called, in their order; empty where nobody needs it.
    """

    baseline: tuple[Measure, ...]
    candidate: tuple[Measure, ...]
    clusters: int
    samples: int
    names: tuple[str, ...] = ()

    def differences(self, weights: Array) -> Array:
        """Return candidate minus baseline, the mean over the runs, for each row of weights."""
        found = [
            after.values(weights) - before.values(weights)
            for before, after in zip(self.baseline, self.candidate, strict=True)
        ]
        mean: Array = np.mean(found, axis=0)
        return mean

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All scores."""
        return (*self.baseline, *self.candidate)

    @property
    def influences(self) -> Array:
        """Return how much each cluster pulls the difference, (clusters,)."""
        found: Array = np.mean(
            [
                after.influences() - before.influences()
                for before, after in zip(self.baseline, self.candidate, strict=True)
            ],
            axis=0,
        )
        return found

    @property
    def changed_clusters(self) -> int:
        """Count the clusters that contribute something else to the candidate's score."""
        changes = np.mean(
            [
                after.sums - before.sums
                for before, after in zip(self.baseline, self.candidate, strict=True)
            ],
            axis=0,
        )
        return int((np.abs(changes) > ROUNDING).any(axis=1).sum())


def bootstrap_differences(stratum: Stratum, *, resamples: int, rng: np.random.Generator) -> Array:
    """Draw clusters with replacement and compute the difference of the scores.

    Clusters that contribute the same to every score are kinds: how often a kind is drawn is
    multinomial, which makes large sets of right-or-wrong answers cheap. Otherwise cluster indices
    are drawn, in parts that keep 40,000 clusters far below 1 GB.

    Returns:
        Differences, (resamples,); NaN where a class was not drawn.
    """
    kinds, counts = _kinds(stratum)
    width = max(measure.width for measure in kinds.measures)
    found = np.empty(resamples, dtype=np.float64)
    for part in _chunks(resamples, max(1, _WEIGHTS_AT_ONCE // width)):
        size = part.stop - part.start
        if counts is None:
            weights = _draw_clusters(rng, size, stratum.clusters)
        else:
            weights = rng.multinomial(stratum.clusters, counts, size=size).astype(np.float64)
        found[part] = kinds.differences(weights)
    return found


def percentile_interval(draws: Array, freedom: int) -> tuple[float, float]:
    """Return the 95 % percentile interval, expanded for few clusters (Hesterberg 2015).

    Plain percentiles are those of a normal distribution with the variance n / (n - 1) times too
    small; the levels are moved out to those of Student's t. From some hundred clusters on there is
    no difference.
    """
    widening = np.sqrt((freedom + 1) / freedom) * student.ppf((1 + LEVEL) / 2, freedom)
    tail = float(norm.cdf(-widening))
    low, high = (float(end) for end in np.quantile(draws, [tail, 1 - tail]))
    return low, high


def _kinds(stratum: Stratum) -> tuple[Stratum, Array | None]:
    """Return one cluster of each kind and their shares, or the stratum itself and None."""
    if not all(isinstance(measure, RatioMeasure) for measure in stratum.measures):
        return stratum, None
    contents = np.concatenate([measure.sums for measure in stratum.measures], axis=1)
    _, first, counts = np.unique(contents, axis=0, return_index=True, return_counts=True)
    if len(first) * _KINDS > stratum.clusters:
        return stratum, None
    baseline, candidate = (
        tuple(
            RatioMeasure(measure.numerators[first], measure.denominators[first], measure.factor)
            for measure in side
            if isinstance(measure, RatioMeasure)
        )
        for side in (stratum.baseline, stratum.candidate)
    )
    shares = counts / counts.sum()
    return Stratum(baseline, candidate, len(first), stratum.samples), shares


def _draw_clusters(rng: np.random.Generator, draws: int, clusters: int) -> Array:
    """Return how often each cluster was drawn, (draws, clusters)."""
    drawn = rng.integers(0, clusters, size=(draws, clusters))
    drawn += clusters * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * clusters)
    return counts.reshape(draws, clusters).astype(np.float64)


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
