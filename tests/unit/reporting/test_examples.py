from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from reporting_samples import make_column, make_comparison, make_png, make_summary

from kuea_mllm.errors import EvaluationError
from kuea_mllm.reporting.comparison import write_comparison_report
from kuea_mllm.reporting.examples import pick_examples, show_examples


def write_samples(
    results: Path, task: str, scores: Mapping[int, float | None], **column: Any
) -> Path:
    (results / "samples").mkdir(parents=True, exist_ok=True)
    path = results / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else make_summary() | {"columns": {}}
    summary["columns"][task] = {"task": task, "scale": 1, "higher_is_better": True} | column
    path.write_text(json.dumps(summary))
    rows: list[dict[str, Any]] = [
        {
            "doc_id": doc_id,
            "cluster": str(doc_id),
            "question": f"question {doc_id}?",
            "target": "yes",
            "answer": f"answer of {results.name}",
            "score": score,
            "failed": score is None,
        }
        for doc_id, score in scores.items()
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (results / "samples" / f"{task}.jsonl").write_text(text)
    return results


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    before = {i: float(i % 2) for i in range(40)}
    after = {i: float(i % 3 == 0) for i in range(40)}
    baseline = write_samples(tmp_path / "a", "gqa", before)
    candidate = write_samples(tmp_path / "b", "gqa", after)
    return baseline, candidate


def test_wins_losses_and_ties_get_equal_room(pair: tuple[Path, Path]) -> None:
    picked = pick_examples(*pair, ["gqa"], per_kind=3)
    changes = [(e.candidate_score or 0) - (e.baseline_score or 0) for e in picked]
    assert changes == [1.0] * 3 + [-1.0] * 3 + [0.0] * 3


def test_the_choice_is_the_same_every_time(pair: tuple[Path, Path]) -> None:
    assert pick_examples(*pair, ["gqa"]) == pick_examples(*pair, ["gqa"])


def test_wins_are_spread_over_tasks(pair: tuple[Path, Path]) -> None:
    for side, score in zip(pair, (0.0, 1.0), strict=True):
        write_samples(side, "pope", dict.fromkeys(range(10), score))
    picked = pick_examples(*pair, ["gqa", "pope"], per_kind=4)
    assert sorted(example.task for example in picked[:4]) == ["gqa", "gqa", "pope", "pope"]


def test_questions_with_pictures_go_first(pair: tuple[Path, Path]) -> None:
    folder = pair[0] / "thumbnails" / "gqa"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(make_png(8))
    (folder / "6.png").write_bytes(b"not a picture")
    first, second = pick_examples(*pair, ["gqa"], per_kind=2)[:2]
    assert {first.doc_id, second.doc_id} == {"0", "6"}
    assert sorted([first.image is None, second.image is None]) == [False, True]


def test_failed_questions_are_not_picked(tmp_path: Path) -> None:
    baseline = write_samples(tmp_path / "a", "gqa", {1: None, 2: 1.0, 3: 0.0})
    candidate = write_samples(tmp_path / "b", "gqa", {1: 1.0, 2: None, 3: 1.0, 4: 1.0})
    assert [e.doc_id for e in pick_examples(baseline, candidate, ["gqa", "absent"])] == ["3"]


def test_one_model_shows_failures_too(tmp_path: Path) -> None:
    results = write_samples(tmp_path / "a", "gqa", {1: None, 2: 1.0})
    answers = {e.doc_id: e.baseline_answer for e in show_examples(results, "gqa")}
    assert answers == {"1": None, "2": "answer of a"}


def test_unreadable_samples_are_named(tmp_path: Path) -> None:
    results = write_samples(tmp_path / "a", "gqa", {1: 1.0})
    (results / "samples" / "gqa.jsonl").write_text('{"no": 1}\n')
    with pytest.raises(EvaluationError, match=r"gqa\.jsonl"):
        pick_examples(results, results, ["gqa"])


def test_scores_of_another_scale_are_shares(tmp_path: Path) -> None:
    results = write_samples(tmp_path / "a", "pope", {1: 100.0, 2: 30.0}, scale=100)
    scores = {e.doc_id: e.baseline_score for e in show_examples(results, "pope")}
    assert scores == {"1": 1.0, "2": 0.3}


def test_columns_where_lower_is_better_give_no_examples(tmp_path: Path) -> None:
    results = write_samples(tmp_path / "a", "wer", {1: 1.0}, higher_is_better=False)
    assert pick_examples(results, results) == []


def test_report_from_directories_shows_examples(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    comparison = make_comparison(make_column("gqa"))
    write_comparison_report(path, comparison=comparison, baseline=pair[0], candidate=pair[1])
    text = path.read_text(encoding="utf-8")
    assert "answer of a" in text and "answer of b" in text
    assert str(pair[0]) in text and "comparison: resamples" in text
