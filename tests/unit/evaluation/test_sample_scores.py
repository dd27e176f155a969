from __future__ import annotations

import time
from typing import Any

import pytest

from kuea_mllm.evaluation.scores import extract_scores, find_clusters, is_missing_judgement


@pytest.mark.parametrize(
    ("items", "reported", "values", "scale"),
    [
        ([1, 0, True, 1.0], 0.75, [1.0, 0.0, 1.0, 1.0], 1),
        ([{"score": 0.3}, {"score": 0.9}], 0.6, [0.3, 0.9], 1),
        ([{"score": 1}, {"score": 0}], 50.0, [100.0, 0.0], 100),
        ([{"is_correct": True, "pred": "A"}, {"is_correct": False, "pred": "B"}], 0.5, [1, 0], 1),
        ([1, 0, 0], 0.3333, [1, 0, 0], 1),
    ],
)
def test_scores_are_found_where_tasks_put_them(
    items: list[Any], reported: float, values: list[float], scale: int
) -> None:
    scores = extract_scores(items, reported)
    assert scores.is_paired
    assert (scores.values, scores.scale) == (values, scale)


def test_score_key_of_the_task_comes_first() -> None:
    assert extract_scores([{"iou": 0.4, "score": 1}], 0.4, score_key="iou").values == [0.4]


def test_score_that_is_no_mean_is_not_paired() -> None:
    scores = extract_scores([{"score": 1}, {"score": 0}], 0.66)
    assert not scores.is_paired
    assert scores.values == [None, None]
    assert scores.reason is not None
    assert "not the mean" in scores.reason


def test_aggregation_of_single_documents_stands_in_for_missing_scores() -> None:
    def hit_rate(results: list[Any]) -> float:
        print("aggregating")  # noqa: T201
        hits = [float(result["pred"] == result["box"]) for result in results]
        return sum(hits) / len(hits)

    items = [{"pred": 1, "box": 1}, {"pred": 2, "box": 1}]
    assert extract_scores(items, 0.5, aggregate=hit_rate).values == [1.0, 0.0]


def test_slow_or_failing_aggregations_are_left_alone() -> None:
    def slow(results: list[Any]) -> float:
        time.sleep(0.03)
        return 0.0

    def failing(results: list[Any]) -> float:
        raise ZeroDivisionError

    for aggregate in (slow, failing):
        scores = extract_scores([{"a": 1}] * 2, 0.0, aggregate=aggregate)
        assert scores.reason == "the task gives no score per document"


def test_task_without_a_number_is_not_paired() -> None:
    assert not extract_scores([1, 0], None).is_paired
    assert not extract_scores([float("nan"), 0], 0.5).is_paired


def test_cluster_key_of_the_task_is_used_and_gaps_stand_alone() -> None:
    documents = [{"scene": 1}, {"scene": 1}, {}]
    assert find_clusters(documents, [0, 0, 0], [0, 1, 2], "scene") == ["1", "1", "doc 2"]
    items = [{"video": "a", "score": 1}, {"video": "b", "score": 0}]
    assert find_clusters([{}, {}], items, [0, 1], "video") == ["a", "b"]


def test_common_image_keys_are_guessed() -> None:
    documents = [{"image_source": "x.jpg"}, {"image_source": "x.jpg"}, {"image_source": "y.jpg"}]
    assert find_clusters(documents, [0] * 3, [0, 1, 2], None) == ["x.jpg", "x.jpg", "y.jpg"]


def test_regions_of_one_picture_are_one_cluster() -> None:
    names = ("COCO_train2014_000000581857_16.jpg", "COCO_train2014_000000581857_3.jpg")
    documents = [{"file_name": name} for name in (*names, "COCO_train2014_000000580957_0.jpg")]
    first, second, third = find_clusters(documents, [0] * 3, [0, 1, 2], None)
    assert first == second == "COCO_train2014_000000581857.jpg" != third


def test_guessed_key_that_never_varies_is_no_image() -> None:
    documents = [{"file_name": "all.json", "pair_index": i // 2} for i in range(4)]
    assert find_clusters(documents, [0] * 4, [0, 1, 2, 3], None) == ["0", "0", "1", "1"]
    assert find_clusters([{"image_id": 1}] * 2, [0, 0], [4, 5], None) == ["4", "5"]


def test_failed_judge_is_recognised() -> None:
    assert is_missing_judgement({"scores": [-1, -1]})
    assert not is_missing_judgement({"scores": [-999, -999]})
    assert not is_missing_judgement({"score": 1})
    assert not is_missing_judgement(0.5)
