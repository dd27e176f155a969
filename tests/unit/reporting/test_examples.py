from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from reporting_samples import make_column, make_comparison, make_png, make_summary
from suite_samples import write_thumbnails

from kuea_mllm.errors import EvaluationError
from kuea_mllm.reporting.comparison import write_comparison_report
from kuea_mllm.reporting.examples import pick_examples, pick_flips, show_examples


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
    pictures = [(0, "a.png", make_png(8)), (6, "b.png", b"not a picture")]
    write_thumbnails(pair[0], "gqa", pictures)
    first, second = pick_examples(*pair, ["gqa"], per_kind=2)[:2]
    found = {first.doc_id: first, second.doc_id: second}
    assert set(found) == {"0", "6"}
    assert found["0"].image == make_png(8)
    assert found["6"].image is None
    assert (
        found["6"].no_image
        == "picture b.png is not a picture (BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP)"
    )


def test_each_picture_is_shown_once_before_any_twice(tmp_path: Path) -> None:
    results = write_samples(tmp_path / "a", "pope", dict.fromkeys(range(12), 1.0))
    path = results / "samples" / "pope.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(row | {"cluster": f"image-{row['doc_id'] // 4}"}) for row in rows]
    path.write_text("\n".join(lines))
    shown = [int(example.doc_id) // 4 for example in show_examples(results, "pope", number=6)]
    assert sorted(shown[:3]) == sorted(shown[3:]) == [0, 1, 2]


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


def flips_of(pair: tuple[Path, Path], gained: list[int], lost: list[int]) -> dict[str, Any]:
    moved = {
        "improved": {"count": len(gained), "doc_ids": gained},
        "worsened": {"count": len(lost), "doc_ids": lost},
    }
    sides = {
        side: {"path": str(path), "model": {"name": path.name}}
        for side, path in zip(("baseline", "candidate"), pair, strict=True)
    }
    return make_comparison(make_column("gqa", column="GQA", **moved), **sides)


def test_flips_are_those_of_the_comparison(pair: tuple[Path, Path]) -> None:
    gained, lost = [0, 6, 12, 18], [1, 5]
    (column,) = pick_flips(flips_of(pair, gained, lost), *pair, shown=3, listed=5)
    assert column.name == "GQA"
    assert (column.gained.total, column.lost.total) == (4, 2)
    assert [len(column.gained.shown), len(column.gained.listed)] == [3, 1]
    ids = {int(e.doc_id) for e in (*column.gained.shown, *column.gained.listed)}
    assert ids == set(gained)
    assert {int(e.doc_id) for e in column.lost.shown} == set(lost)


def test_columns_without_flips_are_left_out(pair: tuple[Path, Path]) -> None:
    assert pick_flips(flips_of(pair, [], []), *pair) == []


def test_boxes_outside_of_the_picture_are_cut_and_nonsense_is_left_out(
    pair: tuple[Path, Path],
) -> None:
    path = pair[0] / "samples" / "gqa.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"target_box": [-0.5, 0.1, 0.5, 7], "answer_box": [0, 1, "x", 2]}
    path.write_text("\n".join(json.dumps(row) for row in rows))
    (column,) = pick_flips(flips_of(pair, [0], []), *pair)
    (box,) = column.gained.shown[0].boxes
    assert (box.role, box.corners) == ("expected", (0.0, 0.1, 0.5, 1.0))


def test_scores_that_are_no_share_are_said_in_words(tmp_path: Path) -> None:
    results = write_samples(
        tmp_path / "a", "wild", {1: 7.5}, scale=100, statistic="mean_of_group_ratios"
    )
    (example,) = show_examples(results, "wild")
    assert example.baseline_note == "7.5 of 10, reference 0"


def test_report_from_directories_shows_flips(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    comparison = flips_of(pair, [0, 6], [1])
    write_comparison_report(path, comparison=comparison, baseline=pair[0], candidate=pair[1])
    text = path.read_text(encoding="utf-8")
    assert "answer of a" in text and "answer of b" in text
    assert str(pair[0]) in text and "comparison: resamples" in text


def test_missing_directory_is_named(tmp_path: Path) -> None:
    comparison = make_comparison(make_column("gqa"))
    with pytest.raises(EvaluationError, match=r"/r/a holds no summary\.json"):
        write_comparison_report(tmp_path / "r.html", comparison=comparison)
