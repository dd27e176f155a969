from __future__ import annotations

from typing import Any

import pytest

from kuea_mllm.reporting.blocks import Table
from kuea_mllm.reporting.paper import OwnScores, paper_section, paper_tables


def make_summary(columns: dict[str, dict[str, Any]], **settings: Any) -> dict[str, Any]:
    entries = {task: {"task": task, "scale": 1, **entry} for task, entry in columns.items()}
    return {
        "columns": entries,
        "settings": {"suite": "llava-paper", "protocol": "paper"} | settings,
    }


def rows_of(summary: dict[str, Any]) -> dict[str, list[str]]:
    section = paper_section([OwnScores("mine", [summary])])
    assert section is not None
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    return {str(row[0]): [str(cell) for cell in row[1:]] for row in table.rows}


@pytest.mark.parametrize("number", ["5", "6", "13"])
def test_printed_averages_are_those_of_the_printed_values(number: str) -> None:
    for row in paper_tables()[number]["rows"]:
        values = list(row["values"].values())
        # One row of Table 6 is printed 0.05 too low.
        assert sum(values) / len(values) == pytest.approx(row["average"], abs=0.051)
        assert list(row["values"]) == paper_tables()[number]["columns"]


def test_our_scores_stand_above_those_of_the_paper() -> None:
    summary = make_summary({"kuea_paper_pope": {"column": "pope", "score": 0.8612}})
    rows = rows_of(summary)
    assert next(iter(rows)) == "mine (ours)"
    assert rows["mine (ours)"][3] == "86.12"
    assert rows["paper: ViT-L-336 +both"][3] == "85.70"
    assert rows["paper: ViT-L-336 +both"][-2:] == ["34.00", "61.70"]
    assert set(rows["mine (ours)"]) == {"86.12", "–"}  # noqa: RUF001


def test_seeds_are_averaged() -> None:
    runs = [make_summary({"p": {"column": "pope", "score": score}}) for score in (0.8, 0.9)]
    section = paper_section([OwnScores("mine", runs)])
    assert section is not None and isinstance(section.blocks[1], Table)
    assert section.blocks[1].rows[0][4] == "85.00"


def test_known_resolution_leaves_the_other_out() -> None:
    tower = {"spec": {"image_size": 336}}
    rows = rows_of(make_summary({}) | {"model_record": {"tower": tower}})
    assert "paper: ViT-L-336 baseline" in rows
    assert "paper: ViT-L baseline" not in rows
    assert "paper, Table 13: Ours" in rows


def test_few_shot_trials_are_averaged() -> None:
    columns = {
        "coco_4shot_seed42": {"score": 80.0, "scale": 100},
        "coco_4shot_seed43": {"score": 90.0, "scale": 100},
    }
    summary = make_summary(columns, suite="flamingo-paper", protocol="open-flamingo")
    rows = rows_of(summary)
    assert rows["mine (ours)"][:2] == ["4", "85.00"]
    assert rows["paper: +align"][:2] == ["4", "83.95"]


@pytest.mark.parametrize("suite", [None, "quick"])
def test_other_suites_are_not_set_beside_the_paper(suite: str | None) -> None:
    summary = make_summary({"pope": {"score": 0.5}}, suite=suite)
    assert paper_section([OwnScores("mine", [summary])]) is None


def test_caution_says_what_is_different() -> None:
    section = paper_section([OwnScores("mine", [make_summary({}, protocol="padded", limit=100)])])
    assert section is not None
    text = getattr(section.blocks[0], "text", "")
    assert "protocol here is “padded”" in text
    assert "at most 100 questions" in text


def test_task_beside_the_suite_is_no_column_of_it() -> None:
    own = {"column": "pope", "score": 0.86, "suite": "llava-paper"}
    summary = make_summary({"kuea_paper_pope": own, "pope": {"score": 0.5, "suite": None}})
    assert rows_of(summary)["mine (ours)"][3] == "86.00"
