"""What the statistics promise, on simulated pairs of models whose true difference is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from kuea_mllm.evaluation.comparing.resampling import Stratum
from kuea_mllm.evaluation.comparing.stats import (
    compare_measures,
    compare_pairs,
    decide,
    holm_adjust,
)
from kuea_mllm.evaluation.measures import Array, RatioMeasure
from kuea_mllm.evaluation.statistics import Outcomes

RUNS = 600

Maker = Callable[[np.random.Generator, int], Stratum]


def single(before: Array, after: Array) -> Stratum:
    ones = np.ones((len(before), 1))
    first, second = (RatioMeasure(scores[:, None], ones) for scores in (before, after))
    return Stratum((first,), (second,), len(before), len(before))


def make_binary(rng: np.random.Generator, count: int) -> Stratum:
    before = (rng.random(count) < 0.6).astype(np.float64)
    return single(before, np.where(rng.random(count) < 0.1, 1 - before, before))


def make_soft(rng: np.random.Generator, count: int) -> Stratum:
    before = np.round(rng.beta(0.6, 0.4, count), 1)
    changes = rng.normal(0.05, 0.3, count) * (rng.random(count) < 0.3)
    return single(before, np.clip(np.round(before + changes, 1), 0, 1))


def make_clustered(rng: np.random.Generator, images: int) -> Stratum:
    sizes = rng.integers(1, 8, images)
    image = np.repeat(np.arange(images), sizes)
    ease = np.clip(rng.normal(0.5, 0.3, images), 0, 1)
    rates = (ease, np.clip(ease + rng.normal(0.05, 0.15, images), 0, 1))
    first, second = (
        RatioMeasure(
            np.bincount(image, weights=rng.random(len(image)) < rate[image])[:, None].astype(float),
            sizes[:, None].astype(float),
        )
        for rate in rates
    )
    return Stratum((first,), (second,), images, len(image))


def make_judged(rng: np.random.Generator, count: int) -> Stratum:
    """Judgements of 1 to 10 in three categories, each run with references of its own."""
    quality, measures = rng.normal(size=count), []
    for level in (5.0, 5.5):
        sums = []
        for mean, slope, noise in ((level, 1.0, 1.5), (8.0, 0.5, 1.0)):
            points = np.round(mean + slope * quality + noise * rng.normal(size=count))
            cells = np.zeros((count, 3))
            cells[np.arange(count), np.arange(count) % 3] = np.clip(points, 1, 10)
            sums.append(cells)
        measures.append(RatioMeasure(*sums, factor=100.0))
    return Stratum((measures[0],), (measures[1],), count, count)


def make_area(rng: np.random.Generator, count: int) -> Stratum:
    labels = (rng.random(count) < 0.4).astype(np.int64)
    shared, measures = rng.normal(size=count), []
    for gap in (0.3, 0.6):
        scores = shared + gap * labels + rng.normal(0, 0.7, count)
        own = np.arange(count)
        outcomes = Outcomes(scores, own, count, own * 0 - 1, (), np.ones(count), labels)
        measures.append(outcomes.measure("roc_auc"))
    return Stratum((measures[0],), (measures[1],), count, count)


def true_difference(make: Maker) -> float:
    """The difference that a large sample shows."""
    large = make(np.random.default_rng(99), 400_000)
    return float(large.differences(np.ones((1, large.clusters)))[0])


def area_difference() -> float:
    spread = np.sqrt(2 * (1 + 0.7**2))
    return float(norm.cdf(0.6 / spread) - norm.cdf(0.3 / spread))


@pytest.mark.parametrize(
    ("make", "clusters", "truth", "runs"),
    [
        pytest.param(make_binary, 300, 0.1 * (0.4 - 0.6), RUNS, id="right or wrong"),
        pytest.param(make_soft, 300, None, RUNS, id="soft"),
        pytest.param(make_clustered, 120, None, RUNS, id="clustered"),
        pytest.param(make_judged, 60, None, RUNS, id="ratio, as few as LLaVA-Bench"),
        pytest.param(make_area, 150, area_difference(), 300, id="area under the curve"),
    ],
)
def test_interval_covers_the_truth_as_often_as_it_says(
    make: Maker, clusters: int, truth: float | None, runs: int
) -> None:
    truth = true_difference(make) if truth is None else truth
    rng, hits = np.random.default_rng(0), 0
    for seed in range(runs):
        found = compare_measures([make(rng, clusters)], top=100.0, resamples=599, seed=seed)
        hits += (found.low or 0.0) <= truth <= (found.high or 0.0)
    assert 0.93 <= hits / runs <= 0.97


def test_plain_bootstrap_of_samples_would_not_cover_clustered_ones() -> None:
    rng, hits = np.random.default_rng(0), 0
    for seed in range(150):
        shared = np.repeat(rng.normal(scale=0.3, size=60), 6)
        changes = 0.05 + shared + rng.normal(scale=0.3, size=360)
        found = compare_measures([single(0 * changes, changes)], resamples=500, seed=seed)
        hits += (found.low or 0.0) <= 0.05 <= (found.high or 0.0)
    assert hits / 150 < 0.85


@pytest.mark.parametrize("make", [make_clustered, make_judged])
def test_detectable_difference_is_found_in_four_of_five_runs(make: Maker) -> None:
    """Shift the true difference to what samples call detectable, and look again."""
    rng, count = np.random.default_rng(8), 200
    stated = np.mean(
        [compare_measures([make(rng, count)], resamples=100).detectable for _ in range(30)]
    )
    truth, found = true_difference(make), 0
    for seed in range(250):
        result = compare_measures([make(rng, count)], top=100.0, resamples=400, seed=seed)
        shift = stated - truth
        found += (result.low or 0.0) + shift > 0.0 or (result.high or 0.0) + shift < 0.0
    assert found / 250 == pytest.approx(0.8, abs=0.06)


def test_mcnemar_keeps_its_level_and_finds_the_detectable_difference() -> None:
    rng, count, flips = np.random.default_rng(5), 600, 0.1
    samples = [rng.choice([-1.0, 0.0, 1.0], count, p=[0.05, 0.9, 0.05]) for _ in range(30)]
    stated = float(
        np.mean(
            [compare_measures([single(0 * x, x)], resamples=100).detectable or 0.0 for x in samples]
        )
    )
    rates = []
    for truth in (0.0, stated):
        # Of the discordant answers so many more are gains that the difference is the true one.
        gains = 0.5 * (1 + truth / flips)
        rejected = 0
        for seed in range(250):
            discordant = rng.random(count) < flips
            after = (rng.random(count) < gains).astype(np.float64)
            pair = single(np.where(discordant, 1 - after, 0.0), np.where(discordant, after, 0.0))
            result = compare_measures([pair], resamples=300, seed=seed)
            assert result.test == "mcnemar"
            rejected += (result.p_value or 0.0) <= 0.05
        rates.append(rejected / 250)
    assert rates[0] <= 0.075
    # The exact test is a little conservative.
    assert rates[1] == pytest.approx(0.78, abs=0.06)


@pytest.mark.parametrize(
    ("shift", "verdict", "least"),
    [(0.12, "better", 0.95), (-0.12, "worse", 0.95), (0.0, None, 0.0)],
)
def test_verdict_is_right_for_known_models(shift: float, verdict: str | None, least: float) -> None:
    rng, decided = np.random.default_rng(6), []
    for seed in range(60):
        ease = np.repeat(rng.random(200), 3)
        before, after = (
            (rng.random(600) < np.clip(ease + change, 0, 1)).astype(np.float64)
            for change in (0.0, shift)
        )
        images = [str(number // 3) for number in range(600)]
        found = compare_pairs(before, after, images, resamples=400, seed=seed)
        # One of two columns; the other shows nothing.
        p_holm = holm_adjust([found.p_value, 0.5])[0]
        decided.append(decide(found.difference, found.low, found.high, p_holm))
    if verdict is None:
        assert decided.count("cannot tell") / 60 >= 0.9
    else:
        assert decided.count(verdict) / 60 >= least
        assert set(decided) <= {verdict, "cannot tell"}
