"""Paired statistics of two systems on the same test set (numpy and scipy only).

Two models that answer the same questions are compared by the difference of a score, whatever
statistic of the documents it is (`statistics`). Questions about one image are not independent, so
whole clusters (images) are resampled, the same ones for both models. What a sample cannot tell is
said: no changed score, or one cluster, is never a certainty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from kuea_mllm.evaluation.comparing.resampling import (
    LEVEL,
    ROUNDING,
    Stratum,
    bootstrap_differences,
    percentile_interval,
)
from kuea_mllm.evaluation.measures import Array, RatioMeasure
from kuea_mllm.evaluation.statistics import influence_error

Verdict = Literal["better", "worse", "cannot tell"]
Test = Literal["mcnemar", "bootstrap"]

ALPHA = 0.05
POWER = 0.8
FEW_CLUSTERS = 20


@dataclass(frozen=True)
class PairedDifference:
    """What paired samples say about candidate minus baseline.

    Attributes:
        difference: Difference of the scores.
        low: Lower end of the 95 % interval; None where the sample does not give one.
        high: Upper end of it.
        p_value: Two-sided p of "no difference"; None where the sample does not give one.
        test: How `p_value` was found.
        detectable: Smallest true difference found with 80 % power (two-sided, 5 %); approximate.
        samples: Pairs used.
        clusters: Independent groups among them.
        changed_clusters: Those whose score changed.
        draws: Bootstrap differences, one per resample; None where resampling says nothing.
        note: A warning about a degenerate or small sample.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    test: Test | None
    detectable: float | None
    samples: int
    clusters: int
    changed_clusters: int
    draws: Array | None
    note: str | None


@dataclass(frozen=True)
class SeedSpread:
    """What the runs of several seeds say about candidate minus baseline, apart from the test set.

    Attributes:
        count: Pairs of runs.
        differences: Candidate minus baseline of each.
        std: Standard deviation between them (n - 1).
        low: Lower end of the 95 % t interval of their mean.
        high: Upper end of it.
    """

    count: int
    differences: tuple[float, ...]
    std: float
    low: float
    high: float


def compare_pairs(
    baseline: Sequence[float] | Array,
    candidate: Sequence[float] | Array,
    clusters: Sequence[str],
    *,
    top: float = 1.0,
    resamples: int = 10_000,
    seed: int | np.random.SeedSequence = 0,
) -> PairedDifference:
    """Compare two runs on the same samples by the mean of their scores.

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
    names, members = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sizes = np.bincount(members).astype(np.float64)[:, None]
    first, second = (
        RatioMeasure(np.bincount(members, weights=scores).astype(np.float64)[:, None], sizes)
        for scores in (before, after)
    )
    stratum = Stratum((first,), (second,), len(names), len(before))
    return compare_measures([stratum], top=top, resamples=resamples, seed=seed)


def compare_measures(
    strata: Sequence[Stratum],
    *,
    top: float = 1.0,
    resamples: int = 10_000,
    seed: int | np.random.SeedSequence = 0,
) -> PairedDifference:
    """Compare two systems by any score.

    The interval is a percentile bootstrap over clusters, its levels widened for few clusters. The
    p-value is exact McNemar where one run of each system got one right-or-wrong answer per cluster,
    else the bootstrap's. Runs of one stratum are resampled together, strata apart; each run counts
    the same.

    Args:
        strata: The runs.
        top: Highest possible score, the width of what a single cluster can change.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    shares = [len(stratum.baseline) for stratum in strata]
    weights = [share / sum(shares) for share in shares]
    difference = sum(
        weight * float(stratum.differences(np.ones((1, stratum.clusters)))[0])
        for weight, stratum in zip(weights, strata, strict=True)
    )
    samples, clusters = (
        sum(stratum.samples for stratum in strata),
        sum(stratum.clusters for stratum in strata),
    )
    if min(stratum.clusters for stratum in strata) < 2:
        return _one_cluster(difference, samples, clusters)
    rng = np.random.default_rng(seed)
    draws = np.zeros(resamples)
    for weight, stratum in zip(weights, strata, strict=True):
        draws += weight * bootstrap_differences(stratum, resamples=resamples, rng=rng)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return _one_cluster(difference, samples, clusters)
    changed = sum(stratum.changed_clusters for stratum in strata)
    pair = _answers_of_clusters(strata, top)
    p_value = bootstrap_p(draws, changed) if pair is None else mcnemar_p(*pair)
    freedom = clusters - len(strata)
    low, high = percentile_interval(draws, freedom)
    if float(np.ptp(draws)) <= ROUNDING * max(top, 1.0):
        low, high = unseen_change_bounds(difference, clusters, top)
    errors = [influence_error(stratum.influences) or 0.0 for stratum in strata]
    error = float(np.sqrt(sum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))))
    return PairedDifference(
        difference=difference,
        low=low,
        high=high,
        p_value=p_value,
        test="bootstrap" if pair is None else "mcnemar",
        detectable=detectable_difference(error) if error > ROUNDING else None,
        samples=samples,
        clusters=clusters,
        changed_clusters=changed,
        # Resamples that lack a class have no score; averages need as many draws of each column.
        draws=np.resize(draws, resamples),
        note=_note(changed, clusters),
    )


def detectable_difference(error: float) -> float:
    """Return the true difference that is found with 80 % power, given its standard error."""
    return float(error * (norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)))


def seed_spread(differences: Sequence[float]) -> SeedSpread | None:
    """Return the spread between seeds; None for a single one."""
    count = len(differences)
    if count < 2:
        return None
    values = np.asarray(differences, dtype=np.float64)
    std = float(values.std(ddof=1))
    half = float(student.ppf((1 + LEVEL) / 2, count - 1)) * std / float(np.sqrt(count))
    mean = float(values.mean())
    return SeedSpread(count, tuple(values.tolist()), std, mean - half, mean + half)


def mcnemar_p(baseline: Sequence[float] | Array, candidate: Sequence[float] | Array) -> float:
    """Exact two-sided McNemar test on the samples that only one of the two runs gets right."""
    before, after = np.asarray(baseline), np.asarray(candidate)
    gained, lost = int((after > before).sum()), int((after < before).sum())
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


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


def sign_flip_floor(changed_clusters: int) -> float:
    """Smallest two-sided p that this many changed clusters can give under sign flips.

    A bootstrap of a handful of clusters that all moved the same way would call itself certain.
    """
    return float(min(1.0, 2.0 ** (1 - changed_clusters)))


def bootstrap_p(draws: Array, changed_clusters: int) -> float:
    """Two-sided p of "no difference" from bootstrap draws, never below the sign-flip floor."""
    # Sums of tenths that cancel leave rounding errors, which are no differences.
    tail = min((draws <= ROUNDING).sum(), (draws >= -ROUNDING).sum())
    p_value = min(1.0, 2.0 * (float(tail) + 1.0) / (len(draws) + 1.0))
    return max(p_value, sign_flip_floor(changed_clusters))


def _answers_of_clusters(strata: Sequence[Stratum], top: float) -> tuple[Array, Array] | None:
    """Return the right-or-wrong answer of each cluster, if that is all there is."""
    if len(strata) > 1 or len(strata[0].baseline) > 1:
        return None
    answers = []
    for measure in strata[0].measures:
        if not isinstance(measure, RatioMeasure) or measure.numerators.shape[1] > 1:
            return None
        scores = measure.factor * measure.numerators[:, 0]
        if not np.all(measure.denominators == 1.0) or not np.isin(scores, (0.0, top)).all():
            return None
        answers.append(scores)
    return answers[0], answers[1]


def _one_cluster(difference: float, samples: int, clusters: int) -> PairedDifference:
    return PairedDifference(
        difference=difference,
        low=None,
        high=None,
        p_value=None,
        test=None,
        detectable=None,
        samples=samples,
        clusters=clusters,
        changed_clusters=0,
        draws=None,
        note=f"all {samples} samples belong to one cluster: no interval and no p-value.",
    )


def _note(changed: int, clusters: int) -> str | None:
    if not changed:
        return (
            "no cluster's total changed: the interval is what this many clusters could have missed."
        )
    if clusters < FEW_CLUSTERS:
        return f"only {clusters} clusters: the interval is rough."
    return None
