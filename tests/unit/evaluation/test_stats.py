from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest

from kuea_mllm.evaluation.stats import (
    bootstrap_means,
    bootstrap_p,
    cluster_standard_error,
    compare_pairs,
    decide,
    holm_adjust,
    mcnemar_p,
    unseen_change_bounds,
)


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


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    clusters, size, truth, runs, hits = 60, 4, 0.05, 300, 0
    names = [str(index // size) for index in range(clusters * size)]
    for run in range(runs):
        shared = np.repeat(rng.normal(scale=0.3, size=clusters), size)
        changes = truth + shared + rng.normal(scale=0.3, size=clusters * size)
        found = compare_pairs(np.zeros(len(names)), changes, names, resamples=600, seed=run)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    # 95 % nominal; 300 runs leave a standard error of 1.3 points, the percentile costs about one.
    assert 0.90 <= hits / runs <= 0.985


def test_bootstrap_draws_are_multinomial_weights() -> None:
    sums, sizes = np.array([1.0, 0.0, 3.0]), np.array([1.0, 2.0, 3.0])
    draws = bootstrap_means(sums, sizes, resamples=40_000, seed=0)
    rng = np.random.default_rng(1)
    counts = rng.multinomial(3, [1 / 3] * 3, size=40_000)
    expected = (counts @ sums) / (counts @ sizes)
    assert draws.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert draws.std() == pytest.approx(expected.std(), abs=0.01)


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


def test_detectable_difference_is_the_one_found_in_four_of_five_runs() -> None:
    rng = np.random.default_rng(5)
    sample = rng.normal(scale=0.4, size=400)
    found = compare_pairs(np.zeros(400), sample, own_clusters(400), resamples=500)
    assert found.detectable is not None
    error = 0.4 / math.sqrt(400)
    detected = [abs(found.detectable + error * z) > 1.96 * error for z in rng.normal(size=4000)]
    assert np.mean(detected) == pytest.approx(0.8, abs=0.05)


def test_cluster_standard_error_equals_the_plain_one_without_clusters() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    plain = values.std(ddof=1) / math.sqrt(5)
    assert cluster_standard_error(values, own_clusters(5)) == pytest.approx(plain)
    assert cluster_standard_error(values, ["one"] * 5) is None


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
