"""Paired statistics of two runs on the same test set (numpy and scipy only).

Two models that answer the same questions are compared by the differences of their scores per
question. Questions about one image are not independent, so whole clusters (images) are resampled.
What a sample cannot tell is said: no changed score, or one cluster, is never a certainty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm

Array = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "cannot tell"]

LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8
FEW_CLUSTERS = 20
# Cluster draws that are held at once: 2**22 indices of 8 bytes and two gathers of them, ~100 MB.
_DRAWS_AT_ONCE = 2**22
ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedDifference:
    """What paired samples say about candidate minus baseline.

    Attributes:
        difference: Mean difference of the scores.
        low: Lower end of the 95 % interval; None where the sample does not give one.
        high: Upper end of it.
        p_value: Two-sided p of "no difference"; None where the sample does not give one.
        test: How `p_value` was found.
        detectable: Smallest true difference found with 80 % power (two-sided, 5 %); approximate.
        samples: Pairs used.
        clusters: Independent groups among them.
        draws: Bootstrap means, one per resample; None where resampling says nothing.
        note: A warning about a degenerate or small sample.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    test: Literal["mcnemar", "bootstrap"] | None
    detectable: float | None
    samples: int
    clusters: int
    draws: Array | None
    note: str | None


def compare_pairs(
    baseline: Sequence[float] | Array,
    candidate: Sequence[float] | Array,
    clusters: Sequence[str],
    *,
    top: float = 1.0,
    resamples: int = 10_000,
    seed: int | np.random.SeedSequence = 0,
) -> PairedDifference:
    """Compare two runs on the same samples.

    The interval is a percentile bootstrap over clusters. The p-value is exact McNemar where scores
    are 0 or `top` and every sample is a cluster of its own, else the bootstrap's.

    Args:
        baseline: Scores of the first run, (n,).
        candidate: Scores of the second run on the same samples, (n,).
        clusters: Cluster of each sample, (n,); samples of one cluster depend on each other.
        top: Highest possible score, the width of what a single sample can change.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: If the lengths differ or there is no sample.
    """
    before, after = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if not len(before) == len(after) == len(clusters) or not len(before):
        raise ValueError(
            f"paired samples expected: {len(before)} baseline scores, {len(after)} candidate "
            f"scores, {len(clusters)} clusters."
        )
    changes = after - before
    sums, sizes = _cluster_totals(changes, clusters)
    difference, count = float(changes.mean()), len(sums)
    if count < 2:
        return _one_cluster(difference, len(changes))
    draws = bootstrap_means(sums, sizes, resamples=resamples, seed=seed)
    is_exact = is_binary(before, top) and is_binary(after, top) and count == len(changes)
    p_value = mcnemar_p(before, after) if is_exact else _bootstrap_p(draws, sums)
    low, high = (float(end) for end in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    note = _note(changes, count)
    if np.ptp(sums / sizes) <= ROUNDING:
        low, high = unseen_change_bounds(difference, count, top)
    error = cluster_standard_error(changes, clusters)
    detectable = (
        None
        if error is None or error <= ROUNDING
        else float(error * (norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)))
    )
    test: Literal["mcnemar", "bootstrap"] = "mcnemar" if is_exact else "bootstrap"
    return PairedDifference(
        difference, low, high, p_value, test, detectable, len(changes), count, draws, note
    )


def mcnemar_p(baseline: Sequence[float] | Array, candidate: Sequence[float] | Array) -> float:
    """Exact two-sided McNemar test on the samples that only one of the two runs gets right."""
    before, after = np.asarray(baseline), np.asarray(candidate)
    gained, lost = int((after > before).sum()), int((after < before).sum())
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def bootstrap_means(
    sums: Array, sizes: Array, *, resamples: int, seed: int | np.random.SeedSequence
) -> Array:
    """Resample clusters with replacement and take the mean over their samples.

    Drawing cluster indices has the distribution of multinomial counts and is ten times faster
    than drawing those; chunks keep 40,000 clusters far below 1 GB.

    Args:
        sums: Sum of the values of each cluster, (clusters,).
        sizes: Number of samples of each cluster, (clusters,).
        resamples: Number of resamples.
        seed: Seed of the generator.

    Returns:
        Means, (resamples,).
    """
    rng = np.random.default_rng(seed)
    has_one_size = bool(np.all(sizes == sizes[0]))
    means = np.empty(resamples, dtype=np.float64)
    for part in _chunks(resamples, max(1, _DRAWS_AT_ONCE // len(sums))):
        drawn = rng.integers(0, len(sums), size=(part.stop - part.start, len(sums)))
        totals = sums[drawn].sum(axis=1)
        counts = len(sums) * sizes[0] if has_one_size else sizes[drawn].sum(axis=1)
        means[part] = totals / counts
    return means


def holm_adjust(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for the number of tests (Holm); None stays None and does not count."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        adjusted[index] = highest
    return adjusted


def decide(
    difference: float,
    low: float | None,
    high: float | None,
    p_value: float | None,
    *,
    higher_is_better: bool = True,
) -> Verdict:
    """Turn an interval and an (adjusted) p-value into a verdict; both have to agree."""
    if low is None or high is None or p_value is None:
        return "cannot tell"
    if p_value > ALPHA or low <= 0.0 <= high:
        return "cannot tell"
    return "better" if (difference > 0.0) == higher_is_better else "worse"


def cluster_standard_error(
    values: Sequence[float] | Array, clusters: Sequence[str]
) -> float | None:
    """Cluster-robust standard error of a mean; None below two clusters."""
    array = np.asarray(values, dtype=np.float64)
    sums, sizes = _cluster_totals(array - array.mean(), clusters)
    count = len(sums)
    if count < 2:
        return None
    return float(np.sqrt(np.square(sums).sum() * count / (count - 1)) / sizes.sum())


def unseen_change_bounds(difference: float, clusters: int, top: float) -> tuple[float, float]:
    """Bound a difference that is the same in every cluster, where resampling shows no spread.

    At most a share `u` of all clusters may behave otherwise without having been seen
    (Clopper-Pearson for 0 of n), and each of those may change a score from one end to the other.
    """
    unseen = 1.0 - ((1.0 - LEVEL) / 2) ** (1.0 / clusters)
    return (
        max(-top, difference - unseen * (difference + top)),
        min(top, difference + unseen * (top - difference)),
    )


def is_binary(scores: Array, top: float = 1.0) -> bool:
    """Say whether scores are right-or-wrong."""
    return bool(np.all((scores == 0.0) | (scores == top)))


def sign_flip_floor(changed_clusters: int) -> float:
    """Smallest two-sided p that this many changed clusters can give under sign flips.

    A bootstrap of a handful of clusters that all moved the same way would call itself certain.
    """
    return float(min(1.0, 2.0 ** (1 - changed_clusters)))


def bootstrap_p(draws: Array, changed_clusters: int) -> float:
    """Two-sided p of "no difference" from bootstrap means, never below the sign-flip floor."""
    # Sums of tenths that cancel leave rounding errors, which are no differences.
    tail = min((draws <= ROUNDING).sum(), (draws >= -ROUNDING).sum())
    p_value = min(1.0, 2.0 * (float(tail) + 1.0) / (len(draws) + 1.0))
    return max(p_value, sign_flip_floor(changed_clusters))


def _one_cluster(difference: float, samples: int) -> PairedDifference:
    return PairedDifference(
        difference=difference,
        low=None,
        high=None,
        p_value=None,
        test=None,
        detectable=None,
        samples=samples,
        clusters=1,
        draws=None,
        note=f"all {samples} samples belong to one cluster: no interval and no p-value.",
    )


def _bootstrap_p(draws: Array, sums: Array) -> float:
    return bootstrap_p(draws, int((np.abs(sums) > ROUNDING).sum()))


def _cluster_totals(values: Array, clusters: Sequence[str]) -> tuple[Array, Array]:
    _, members = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return (
        np.bincount(members, weights=values).astype(np.float64),
        np.bincount(members).astype(np.float64),
    )


def _note(changes: Array, clusters: int) -> str | None:
    if not changes.any():
        return "no score changed: the interval is what this many clusters could have missed."
    if clusters < FEW_CLUSTERS:
        return f"only {clusters} clusters: the interval is rough."
    return None


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
