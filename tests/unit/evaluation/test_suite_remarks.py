"""What is said beside the scores of boxes."""

from __future__ import annotations

from typing import Any

import pytest

from kuea_mllm.config.evaluate import SuiteSettings
from kuea_mllm.evaluation.results import SampleRow
from kuea_mllm.evaluation.suites.registry import DataFolders, plan_columns
from kuea_mllm.evaluation.suites.remarks import foreign_boxes, remarks_on
from kuea_mllm.reporting.rows import summary_remarks

WHOLE, CROPPED = {"pads_to_square": True}, {"pads_to_square": False}


def row(box: tuple[float, float, float, float] | None, *, failed: bool = False) -> SampleRow:
    return SampleRow(
        doc_id=0,
        cluster="a",
        question="?",
        target="",
        answer="",
        score=0.0,
        failed=failed,
        answer_box=box,
    )


ROWS = [row((0.1, 0.1, 0.2, 0.2)), row(None), row(None), row(None, failed=True)]


def remarks(protocol: str, metric: str, runtime: dict[str, Any]) -> list[str]:
    return remarks_on({"protocol": protocol, "metric": metric}, ROWS, runtime)


def test_answers_that_are_no_box_are_counted() -> None:
    expected = ["2 of 4 answers are no box and count as wrong"]
    assert remarks("paper", "box_accuracy", CROPPED) == expected
    assert remarks("padded", "box_accuracy", WHOLE) == expected
    assert remarks("paper", "accuracy", CROPPED) == []
    assert remarks_on({"protocol": "paper", "metric": "box_accuracy"}, ROWS[:1], WHOLE) == []


@pytest.mark.parametrize(("runtime", "known"), [(WHOLE, 1), (CROPPED, 2), ({}, 1)])
def test_boxes_of_a_square_that_was_not_shown_are_remarked(
    runtime: dict[str, Any], known: int
) -> None:
    assert len(remarks("padded", "box_accuracy", runtime)) == known


@pytest.mark.parametrize(
    ("protocol", "columns", "runtime", "warns"),
    [
        ("padded", None, CROPPED, True),
        ("padded", None, WHOLE, False),
        ("padded", ["vsr"], CROPPED, False),
        ("paper", None, CROPPED, False),
        ("lmms-eval", None, CROPPED, False),
    ],
)
def test_they_are_warned_of_before_the_first_question(
    protocol: str, columns: list[str] | None, runtime: dict[str, Any], warns: bool
) -> None:
    settings = SuiteSettings(name="llava-paper", protocol=protocol, columns=columns)
    said = foreign_boxes(plan_columns(settings, DataFolders(None, {})), runtime)
    assert (said is not None) == warns
    if said is not None:
        assert said.startswith("RefCOCOg, RefCOCO+, RefCOCO: ")


def test_the_same_remark_is_made_once_for_all_columns() -> None:
    columns = {
        "a": {"task": "a", "column": "A", "remarks": ["this", "that"]},
        "b": {"task": "b", "missing": "no judge"},
        "c": {"task": "c", "column": "C", "remarks": ["that"]},
    }
    assert summary_remarks({"columns": columns}) == [
        "b is missing: no judge",
        "A: this",
        "A, C: that",
    ]
