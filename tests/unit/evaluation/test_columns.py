"""From lmms-eval's samples to a column: what tasks of ours and stock tasks give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.columns import (
    NO_JUDGE,
    Column,
    build_column,
    column_kind,
    score_column,
)
from kuea_mllm.evaluation.lmms.loading import main_metric


class FakeTask:
    """What `build_column` asks of lmms-eval's task object."""

    VERSION = 1.0

    def __init__(
        self, metrics: dict[str, Callable[[list[Any]], float]], count: int, **config: Any
    ) -> None:
        self.metrics = metrics
        self.config = {"test_split": "test", **config}
        self.eval_docs_no_media = list(range(count))
        self._filters = [SimpleNamespace(name="none")]

    def get_config(self, key: str) -> Any:
        return self.config.get(key)

    def aggregation(self) -> dict[str, Callable[[list[Any]], float]]:
        return self.metrics

    def higher_is_better(self) -> dict[str, bool]:
        return dict.fromkeys(self.metrics, True)


def column_of(
    task: FakeTask,
    items: Sequence[Any],
    score: float | None,
    metric: str = "accuracy",
    document: dict[str, Any] | None = None,
    target: Any = "t",
) -> Column:
    samples = [
        {
            "doc_id": number,
            "doc": document or {},
            "target": target,
            "arguments": ["q"],
            "resps": [["a"]],
            metric: item,
        }
        for number, item in enumerate(items)
    ]
    results = {"results": {"t": {f"{metric},none": score}}}
    return build_column("t", task, results=results, samples=samples, failures=[], limit=None)


def own_task(count: int, statistic: str, **more: Any) -> FakeTask:
    kuea = {
        "suite": "llava-paper",
        "protocol": "paper",
        "column": "pope",
        "statistic": statistic,
        "judged": False,
    }
    metadata = {"version": 1.0, "kuea": kuea | more}
    return FakeTask({"accuracy": max}, count, metadata=metadata, cluster_key="image_id")


ITEMS = [
    {"score": 1.0, "image_id": "a", "group": "x", "answer_box": [0, 0.1, 0.5, 1], "image": "/a"},
    {"score": 0.0, "image_id": "a", "group": "x"},
    {"score": 1.0, "image_id": "b", "group": "y", "label": 1, "target_box": [0, 0, 1]},
]


def test_task_of_ours_states_what_it_is() -> None:
    column = column_of(own_task(3, "mean_of_groups"), ITEMS, 0.75)
    expected = {
        "task": "t",
        "suite": "llava-paper",
        "protocol": "paper",
        "column": "pope",
        "statistic": "mean_of_groups",
        "judged": False,
        "missing": None,
        "split": "test",
        "score": 0.75,
        "scale": 1,
        "paired": True,
        "clusters": 2,
        "breakdown": {"x": 0.5, "y": 1.0},
    }
    assert {key: column.entry[key] for key in expected} == expected
    first, _, last = column.rows
    assert (first.cluster, first.group, first.image) == ("a", "x", "/a")
    assert first.answer_box == (0.0, 0.1, 0.5, 1.0)
    assert (last.label, last.target_box) == (1, None)


def test_score_that_is_not_the_statistic_of_the_documents_is_not_paired() -> None:
    column = column_of(own_task(3, "mean_of_groups"), ITEMS, 2 / 3)
    assert not column.entry["paired"]
    assert "is not the mean over groups" in column.entry["reason"]
    assert (column.entry["score"], column.rows[0].score) == (2 / 3, None)


def test_area_keeps_the_probabilities() -> None:
    chances = zip((0.9, 0.2, 0.4, 0.3), (1, 0, 1, 1), strict=True)
    items = [{"score": p, "image_id": str(p), "label": label} for p, label in chances]
    column = column_of(own_task(4, "roc_auc"), items, 100.0)
    assert (column.entry["scale"], column.entry["paired"]) == (100, True)
    assert [row.score for row in column.rows] == [0.9, 0.2, 0.4, 0.3]


def test_judged_column_is_missing_until_a_judge_scored_it() -> None:
    task = own_task(3, "mean_of_group_ratios", judged=True)
    column = column_of(task, [{**item, "score": 100.0} for item in ITEMS], 100.0)
    assert column.entry["score"] is None
    assert column.entry["missing"] == column.entry["reason"] == NO_JUDGE
    assert not column.entry["paired"]
    assert {row.score for row in column.rows} == {None}
    assert score_column(column).entry == column.entry
    rows = [replace(row, score=4.0 + row.doc_id, reference=8.0) for row in column.rows]
    rows[1] = replace(column.rows[1], failed=True, error="nonsense")
    scored = score_column(replace(column, rows=rows)).entry
    assert scored["score"] == pytest.approx((50 + 75) / 2)
    assert (scored["missing"], scored["reason"], scored["paired"]) == (None, None, True)
    assert (scored["failed"], scored["breakdown"]) == (1, {"x": 50.0, "y": 75.0})


def test_failed_judge_of_a_stock_task_is_no_score_of_100() -> None:
    items = [{"scores": [8, 6]}, {"scores": [-1, -1]}]
    column = column_of(FakeTask({"gpt_eval_llava_all": max}, 2), items, 100.0, "gpt_eval_llava_all")
    assert column.entry["score"] is None
    assert column.entry["missing"] == "the judge gave no score for 1 of 2 documents"


def test_stock_pairs_of_images_are_scored_as_pairs() -> None:
    metrics: dict[str, Any] = {"mmvp_accuracy": max, "mmvp_pair_accuracy": max}
    items = [{"is_correct": i in (0, 1, 2), "pair_index": i // 2} for i in range(6)]
    column = column_of(FakeTask(metrics, 6), items, 1 / 3, "mmvp_pair_accuracy")
    entry = column.entry
    assert (entry["metric"], entry["statistic"]) == ("mmvp_pair_accuracy", "all_right_in_cluster")
    assert (entry["protocol"], entry["suite"], entry["column"]) == ("lmms-eval", None, "t")
    assert (entry["paired"], entry["clusters"]) == (True, 3)


@pytest.mark.parametrize(
    ("metrics", "chosen"),
    [
        (["refcoco_IoU", "refcoco_ACC@0.5", "refcoco_Center_ACC"], "refcoco_ACC@0.5"),
        (["mmvp_accuracy", "mmvp_pair_accuracy"], "mmvp_pair_accuracy"),
        (["pope_f1_score", "pope_accuracy"], "pope_accuracy"),
        (["gpt_eval_llava_conv", "gpt_eval_llava_all"], "gpt_eval_llava_all"),
        (["submission", "exact_match", "other"], "exact_match"),
        (["submission"], None),
    ],
)
def test_benchmarks_are_known_by_one_of_their_metrics(
    metrics: list[str], chosen: str | None
) -> None:
    assert main_metric(FakeTask(dict.fromkeys(metrics, max), 1)) == chosen


def test_mistakes_in_the_metadata_are_named() -> None:
    for kuea, message in (
        ({"statistics": "mean"}, "task t: metadata.kuea cannot be read: .*'statistics'"),
        ({"statistic": "median"}, "task t: metadata.kuea.statistic is 'median'"),
    ):
        with pytest.raises(EvaluationError, match=message):
            column_kind("t", FakeTask({"accuracy": max}, 1, metadata={"kuea": kuea}))


@pytest.mark.parametrize(
    ("document", "rule", "shown"),
    [
        # TextVQA and VQAv2 of lmms-eval.
        ({"answers": ["red", "dark red", "red"]}, "answer", "red | dark red"),
        ({"answers": [{"answer": "2", "answer_id": 1}, {"answer": "2"}]}, "answer", "2"),
        ({"gts": [3, 4]}, "gt", "3 | 4"),
        ({"answer": "yes"}, "answers", "yes"),
        # No name of a field that is missing.
        ({"answer": "answer", "answers": ["no"]}, "answer", "answer"),
        ({"answers": ["no"]}, "the answer", "the answer"),
        # Nothing there that could be shown.
        ({"answers": []}, "answer", "answer"),
        ({"answers": [{"text": "no"}]}, "answer", "answer"),
        ({"question": "what?"}, "answer", "answer"),
    ],
)
def test_right_answers_are_shown_where_the_target_is_the_name_of_no_field(
    document: dict[str, Any], rule: str, shown: str
) -> None:
    task = FakeTask({"accuracy": max}, 2, doc_to_target=rule)
    column = column_of(task, [1.0, 0.0], 0.5, document=document, target=rule)
    assert [row.target for row in column.rows] == [shown, shown]
    plain = column_of(FakeTask({"accuracy": max}, 2), [1.0, 0.0], 0.5, target=rule)
    # Results of other versions stay comparable, and nothing is scored by what is shown.
    assert column.entry == plain.entry


def test_target_that_lmms_eval_knows_is_shown_as_it_is() -> None:
    task = FakeTask({"accuracy": max}, 1, doc_to_target="answers")
    document = {"answers": ["red", "red"]}
    column = column_of(task, [1.0], 1.0, document=document, target=["red", "red"])
    assert column.rows[0].target == '["red", "red"]'
