"""Each statistic by hand, and its error against resampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.columns import Column, score_column
from kuea_mllm.evaluation.comparing.resampling import Stratum, bootstrap_differences
from kuea_mllm.evaluation.results import SampleRow
from kuea_mllm.evaluation.statistics import (
    STATISTICS,
    Outcomes,
    measure_value,
    require_statistic,
    score_items,
    standard_error,
)


def items_of(rows: list[tuple[Any, ...]], *keys: str) -> list[dict[str, Any]]:
    return [dict(zip(("image_id", "score", *keys), row, strict=True)) for row in rows]


GROUPED = items_of(
    [("a", 1.0, "x"), ("a", 0.0, "x"), ("b", 1.0, "x"), ("b", 1.0, "y"), ("c", 0.0, "z")], "group"
)
JUDGED = items_of(
    [("a", 6.0, 8.0, "x"), ("a", 9.0, 9.0, "y"), ("b", 3.0, 7.0, "x"), ("b", 5.0, 10.0, "y")],
    "reference",
    "group",
)
# Class "x" is found in 1 + 2 of 4 + 2 places, "y" in none of 1, "z" in 3 of 3.
COUNTED = items_of(
    [
        ("a", 0.25, {"x": [1, 4]}),
        ("b", 0.5, {"x": [2, 2], "y": [0, 1]}),
        ("b", 1.0, {"z": [3, 3]}),
    ],
    "counts",
)


@pytest.mark.parametrize(
    ("statistic", "items", "expected"),
    [
        ("mean", GROUPED, 3 / 5),
        ("mean_of_groups", GROUPED, (2 / 3 + 1 + 0) / 3),
        ("all_right_in_cluster", GROUPED, 1 / 3),
        ("ratio_of_sums", JUDGED, 100 * 23 / 34),
        ("mean_of_group_ratios", JUDGED, 100 * (9 / 15 + 14 / 19) / 2),
        ("macro_recall", COUNTED, (3 / 6 + 0 + 1) / 3),
    ],
)
def test_statistic_by_hand(statistic: str, items: list[dict[str, Any]], expected: float) -> None:
    assert score_items(statistic, items) == pytest.approx(expected, abs=1e-12)


def test_scores_of_a_column_on_a_scale_of_100() -> None:
    items = [{**item, "score": 100 * item["score"]} for item in GROUPED]
    assert score_items("mean_of_groups", items, 100) == pytest.approx(100 * 5 / 9)
    assert score_items("all_right_in_cluster", items, 100) == pytest.approx(100 / 3)


def test_area_equals_the_known_one_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, labels = np.round(rng.random(200), 1), rng.integers(0, 2, 200)
    items = items_of(list(zip(range(200), scores, labels.tolist(), strict=True)), "label")
    expected = roc_auc_score(labels, scores)
    assert score_items("roc_auc", items) == pytest.approx(expected, abs=1e-12)
    assert score_items("roc_auc", items, 100) == pytest.approx(100 * expected, abs=1e-9)


def test_area_of_resampled_documents_equals_the_one_of_copies() -> None:
    rng = np.random.default_rng(1)
    scores, labels = np.round(rng.random(60), 1), rng.integers(0, 2, 60)
    clusters = np.arange(60) // 2
    items = items_of(list(zip(clusters, scores, labels.tolist(), strict=True)), "label")
    outcomes = Outcomes.of_items("roc_auc", items)
    weights = rng.multinomial(30, [1 / 30] * 30).astype(float)
    # Outcomes sort the names of the clusters.
    order = [int(name) for name in sorted({str(number) for number in clusters})]
    copies = np.repeat(
        np.arange(60), weights[[order.index(number) for number in clusters]].astype(int)
    )
    found = outcomes.measure("roc_auc").values(weights[None, :])[0]
    assert found == pytest.approx(roc_auc_score(labels[copies], scores[copies]), abs=1e-12)


def random_items(rng: np.random.Generator, clusters: int) -> list[dict[str, Any]]:
    items = []
    for cluster in range(clusters):
        level = rng.random()
        for _ in range(int(rng.integers(1, 4))):
            score = float(np.clip(np.round(level + 0.3 * rng.normal(), 1), 0, 1))
            items.append(
                {
                    "image_id": str(cluster),
                    "score": score,
                    "group": "xyz"[int(rng.integers(3))],
                    "reference": float(rng.integers(5, 11)) / 10,
                    "label": int(rng.random() < 0.3 + 0.4 * score),
                    "counts": {
                        name: [int(rng.binomial(there, 0.2 + 0.5 * score)), there]
                        for name, there in zip("uvw", rng.integers(0, 6, 3).tolist(), strict=True)
                    },
                }
            )
    return items


@pytest.mark.parametrize("statistic", STATISTICS)
def test_standard_error_is_the_spread_of_resamples(statistic: str) -> None:
    outcomes = Outcomes.of_items(statistic, random_items(np.random.default_rng(2), 300))
    measure = outcomes.measure(statistic)
    nothing = Outcomes.of_items("mean", [{"image_id": str(i), "score": 0.0} for i in range(300)])
    stratum = Stratum((nothing.measure("mean"),), (measure,), 300, len(outcomes.scores))
    draws = bootstrap_differences(stratum, resamples=4000, rng=np.random.default_rng(0))
    assert measure.influences().sum() == pytest.approx(0.0, abs=1e-9)
    assert standard_error(measure) == pytest.approx(draws.std(), rel=0.06)
    assert draws.mean() == pytest.approx(measure_value(measure, 300), abs=3 * draws.std() / 10)


def test_standard_error_without_clusters_is_the_plain_one() -> None:
    items = [{"image_id": str(i), "score": s} for i, s in enumerate((0.0, 1.0, 1.0, 0.0, 1.0))]
    measure = Outcomes.of_items("mean", items).measure("mean")
    plain = np.std([item["score"] for item in items], ddof=1) / np.sqrt(5)
    assert standard_error(measure) == pytest.approx(plain)
    one = [{**item, "image_id": "one"} for item in items]
    assert standard_error(Outcomes.of_items("mean", one).measure("mean")) is None


def test_breakdown_scores_each_group_by_itself() -> None:
    assert Outcomes.of_items("mean_of_groups", GROUPED).breakdown("mean_of_groups") == {
        "x": pytest.approx(2 / 3),
        "y": 1.0,
        "z": 0.0,
    }
    ratios = Outcomes.of_items("mean_of_group_ratios", JUDGED).breakdown("mean_of_group_ratios")
    assert ratios == {"x": pytest.approx(60.0), "y": pytest.approx(100 * 14 / 19)}
    assert Outcomes.of_items("mean", [{"image_id": "a", "score": 1.0}]).breakdown("mean") == {}


@pytest.mark.parametrize(
    ("statistic", "items", "message"),
    [
        ("mean_of_groups", items_of([("a", 1.0)]), "document 0 has no group"),
        ("ratio_of_sums", items_of([("a", 1.0)]), "document 0 has no reference"),
        ("ratio_of_sums", items_of([("a", 1.0, 0.0)], "reference"), "sum to 0"),
        ("roc_auc", items_of([("a", 1.0, 1)], "label"), "both classes"),
        ("mean", items_of([("a", None)]), "document 0 has no score"),
        ("mean", [], "at least one document"),
    ],
)
def test_what_is_missing_is_named(
    statistic: str, items: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        score_items(statistic, items)


def test_unknown_statistic_names_task_and_known_ones() -> None:
    with pytest.raises(EvaluationError, match=r"task pope: .* 'median'.\n.*mean_of_groups"):
        require_statistic("median", "pope")


def test_clusters_of_other_runs_count_nothing() -> None:
    row = SampleRow(0, "b", "q", "t", "a", 1.0, failed=False)
    for statistic in ("mean", "all_right_in_cluster"):
        outcomes = Outcomes.of_rows(statistic, [row], ["a", "b", "c"])
        assert measure_value(outcomes.measure(statistic), 3) == 1.0


def test_mean_of_groups_without_one_of_them_is_missing() -> None:
    row = SampleRow(0, "0", "q", "t", "a", 8.0, False, group="conv", reference=10.0)
    lost = replace(row, doc_id=1, cluster="1", score=None, failed=True, group="detail")
    entry = {"statistic": "mean_of_group_ratios", "scale": 100, "missing": "no judge"}
    found = score_column(Column(entry, [row, lost])).entry
    assert (found["score"], found["missing"]) == (None, "no document of detail has a score")
    pooled = score_column(Column({**entry, "statistic": "ratio_of_sums"}, [row, lost])).entry
    assert (pooled["score"], pooled["missing"]) == (80.0, None)
