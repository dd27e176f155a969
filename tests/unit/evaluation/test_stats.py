from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest

from kuea_mllm.evaluation.comparing.resampling import (
    Stratum,
    bootstrap_differences,
    percentile_interval,
)
from kuea_mllm.evaluation.comparing.stats import (
    bootstrap_p,
    compare_measures,
    compare_pairs,
    decide,
    holm_adjust,
    mcnemar_p,
    seed_spread,
    unseen_change_bounds,
)
from kuea_mllm.evaluation.measures import RatioMeasure


def own_clusters(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def binary_pairs(
    both: int, gained: int, lost: int, neither: int
) -> tuple[list[float], list[float]]:
    baseline = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    candidate = [1.0] * both + [1.0] * gained + [0.0] * lost + [0.0] * neither
    return baseline, candidate


def test_mcnemar_equals_the_binomial_sum_by_hand() -> None:
    # 8 gained, 2 lost: two-sided P = 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112 / 1024.
    assert mcnemar_p(*binary_pairs(5, 8, 2, 5)) == pytest.approx(112 / 1024)


def test_mcnemar_without_discordant_pairs_is_one() -> None:
    assert mcnemar_p(*binary_pairs(5, 0, 0, 5)) == 1.0


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"), [(60, 20, "better"), (20, 60, "worse"), (41, 39, "cannot tell")]
)
def test_verdict_follows_a_clear_difference(gained: int, lost: int, verdict: str) -> None:
    found = compare_pairs(*binary_pairs(400, gained, lost, 400), own_clusters(800 + gained + lost))
    assert found.test == "mcnemar"
    assert found.difference == pytest.approx((gained - lost) / (800 + gained + lost))
    assert decide(found.difference, found.low, found.high, found.p_value) == verdict


def test_verdict_turns_round_where_lower_is_better() -> None:
    assert decide(0.1, 0.05, 0.15, 0.01, higher_is_better=False) == "worse"
    assert decide(-0.1, -0.15, -0.05, 0.01, higher_is_better=False) == "better"


def test_verdict_needs_interval_and_p_value_to_agree() -> None:
    assert decide(0.1, 0.01, 0.2, 0.2) == "cannot tell"
    assert decide(0.1, -0.01, 0.2, 0.01) == "cannot tell"
    assert decide(0.1, None, None, None) == "cannot tell"


def test_unchanged_scores_are_no_certainty() -> None:
    found = compare_pairs([1.0] * 50, [1.0] * 50, own_clusters(50))
    assert (found.difference, found.p_value, found.detectable) == (0.0, 1.0, None)
    assert found.low is not None
    assert found.high is not None
    # Clopper-Pearson for 0 of 50, two-sided 95 %.
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 50))
    assert found.low == pytest.approx(-found.high)
    assert found.note is not None


def test_constant_gain_of_few_samples_keeps_a_wide_interval() -> None:
    found = compare_pairs([0.0] * 4, [1.0] * 4, own_clusters(4))
    assert found.high == 1.0
    assert found.low is not None
    assert found.low < 0.0
    assert found.p_value == pytest.approx(2 * 0.5**4)
    assert decide(found.difference, found.low, found.high, found.p_value) == "cannot tell"


def test_one_cluster_gives_neither_interval_nor_p_value() -> None:
    found = compare_pairs([0.0, 0.0, 1.0], [1.0, 1.0, 1.0], ["image"] * 3)
    assert (found.low, found.high, found.p_value, found.test) == (None, None, None, None)
    assert decide(found.difference, found.low, found.high, found.p_value) == "cannot tell"


def test_few_clusters_cannot_be_significant_whatever_the_samples_say() -> None:
    clusters = [str(index // 100) for index in range(300)]
    found = compare_pairs([0.0] * 300, [0.5] * 100 + [0.6] * 100 + [0.7] * 100, clusters)
    assert found.p_value == pytest.approx(0.25)


def test_bounds_of_unseen_changes_stay_in_range() -> None:
    low, high = unseen_change_bounds(1.0, 3, 1.0)
    assert (low >= -1.0, high) == (True, 1.0)


def test_clustered_interval_is_wider_than_unclustered() -> None:
    rng = np.random.default_rng(0)
    effect = np.repeat(rng.normal(size=80), 10)
    baseline = np.zeros(800)
    candidate = effect + 0.1 * rng.normal(size=800)
    clusters = [str(index // 10) for index in range(800)]
    wide = compare_pairs(baseline, candidate, clusters, resamples=2000)
    narrow = compare_pairs(baseline, candidate, own_clusters(800), resamples=2000)
    assert wide.high is not None
    assert wide.low is not None
    assert narrow.high is not None
    assert narrow.low is not None
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    # Ten samples that move together count as one: sqrt(10) times the width.
    assert ratio == pytest.approx(math.sqrt(10), rel=0.25)


def test_clustered_binary_scores_are_not_tested_as_independent() -> None:
    baseline, candidate = binary_pairs(0, 30, 0, 30)
    clusters = [str(index // 10) for index in range(60)]
    found = compare_pairs(baseline, candidate, clusters, resamples=2000)
    assert found.test == "bootstrap"
    assert found.p_value is not None
    assert found.p_value > mcnemar_p(baseline, candidate)


def test_resampling_depends_on_the_seed_only() -> None:
    first = compare_pairs([0.0, 1.0, 0.3] * 20, [1.0, 0.0, 0.5] * 20, own_clusters(60), seed=3)
    again = compare_pairs([0.0, 1.0, 0.3] * 20, [1.0, 0.0, 0.5] * 20, own_clusters(60), seed=3)
    assert (first.low, first.high, first.p_value) == (again.low, again.high, again.p_value)


def test_large_test_sets_stay_small_in_memory() -> None:
    rng = np.random.default_rng(0)
    samples, images = 214_000, 40_000
    clusters = [str(name) for name in rng.integers(0, images, size=samples)]
    baseline, candidate = rng.random(samples), rng.random(samples)
    tracemalloc.start()
    start = time.perf_counter()
    compare_pairs(baseline, candidate, clusters, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500 * 2**20
    assert time.perf_counter() - start < 20


def test_holm_steps_down_and_skips_what_has_no_p_value() -> None:
    assert holm_adjust([0.01, None, 0.04, 0.03]) == [
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]
    assert holm_adjust([0.9, 0.8]) == [1.0, 1.0]
    assert holm_adjust([]) == []


def test_bootstrap_p_is_never_zero() -> None:
    assert bootstrap_p(np.full(999, 0.5), 50) == pytest.approx(2 / 1000)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="paired samples"):
        compare_pairs([1.0], [1.0, 0.0], ["a", "b"])
    with pytest.raises(ValueError, match="paired samples"):
        compare_pairs([], [], [])


def stratum_of(before: list[float], after: list[float], sizes: list[float]) -> Stratum:
    counts = np.array(sizes)[:, None]
    first, second = (RatioMeasure(np.array(sums)[:, None], counts) for sums in (before, after))
    return Stratum((first,), (second,), len(sizes), int(sum(sizes)))


@pytest.mark.parametrize("copies", [1, 30])
def test_bootstrap_draws_are_multinomial_weights(copies: int) -> None:
    # Thirty copies of each cluster are drawn as kinds, single ones by their numbers.
    sums, sizes = [1.0, 0.0, 3.0] * copies, [1.0, 2.0, 3.0] * copies
    stratum = stratum_of([0.0] * len(sums), sums, sizes)
    rng = np.random.default_rng(0)
    draws = bootstrap_differences(stratum, resamples=40_000, rng=rng)
    counts = rng.multinomial(3 * copies, [1 / (3 * copies)] * (3 * copies), size=40_000)
    expected = (counts @ sums) / (counts @ sizes)
    assert draws.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert draws.std() == pytest.approx(expected.std(), rel=0.03)


def test_mcnemar_equals_an_independent_formula() -> None:
    for gained, lost in ((0, 1), (3, 3), (7, 2), (1, 12), (40, 22), (130, 171)):
        found = compare_pairs(*binary_pairs(50, gained, lost, 9), own_clusters(59 + gained + lost))
        n, least = gained + lost, min(gained, lost)
        tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
        assert found.test == "mcnemar"
        assert found.p_value == pytest.approx(min(1.0, 2 * tail))


def test_clustered_interval_is_no_wider_where_clusters_do_not_correlate() -> None:
    rng = np.random.default_rng(3)
    candidate = rng.normal(size=4000)
    clusters = [str(index // 10) for index in range(4000)]
    pooled = compare_pairs(np.zeros(4000), candidate, clusters, resamples=2000)
    single = compare_pairs(np.zeros(4000), candidate, own_clusters(4000), resamples=2000)
    widths = [(found.high or 0.0) - (found.low or 0.0) for found in (pooled, single)]
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_interval_is_expanded_for_few_clusters() -> None:
    draws = np.random.default_rng(0).normal(size=200_000)
    low, high = percentile_interval(draws, 9)
    # sqrt(10 / 9) * t(0.975, 9) = 2.385 instead of 1.960.
    assert (-low, high) == (pytest.approx(2.385, abs=0.03), pytest.approx(2.385, abs=0.03))
    assert percentile_interval(draws, 100_000)[1] == pytest.approx(1.96, abs=0.02)


def test_seeds_on_the_same_questions_are_drawn_together() -> None:
    rng = np.random.default_rng(1)
    shared, ones = rng.normal(size=(300, 1)), np.ones((300, 1))
    zero, same = RatioMeasure(0 * ones, ones), RatioMeasure(shared, ones)
    one = Stratum((zero,), (same,), 300, 300)
    together = compare_measures([Stratum((zero,) * 3, (same,) * 3, 300, 300)], resamples=2000)
    apart = compare_measures([one] * 3, resamples=2000)
    alone = compare_measures([one], resamples=2000)
    widths = [(found.high or 0.0) - (found.low or 0.0) for found in (alone, together, apart)]
    # Three runs with the same answers are no more evidence than one; three worlds are.
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] == pytest.approx(widths[0] / math.sqrt(3), rel=0.1)
    assert (alone.detectable or 0) == pytest.approx(together.detectable)
    assert (alone.detectable or 0) == pytest.approx(math.sqrt(3) * (apart.detectable or 0))


def test_spread_of_seeds_is_a_t_interval() -> None:
    spread = seed_spread([1.0, 2.0, 3.0])
    assert spread is not None
    assert spread.std == pytest.approx(1.0)
    # t(0.975, 2) = 4.3027.
    assert (spread.low, spread.high) == (
        pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4),
        pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4),
    )
    assert seed_spread([1.0]) is None
