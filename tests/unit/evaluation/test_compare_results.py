"""What a comparison finds, and what it makes of each statistic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare_data import edit_summary, make_row, scores_of, write_results, write_rows_of

from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.evaluation.results import SampleRow, load_results, write_rows


def test_clear_gain_is_found_with_both_flips(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"pope": scores_of(200, 100)})
    after = write_results(tmp_path / "b", {"pope": [0.0, *scores_of(199, 149)]}, tower="bbb")
    column = compare_results(before, after, resamples=500).columns["pope"]
    assert column.verdict == "better"
    assert column.test == "mcnemar"
    assert column.worsened.doc_ids == (0,)
    assert column.improved.doc_ids == tuple(range(100, 150))
    assert column.difference == pytest.approx(0.245)
    assert column.p_holm == column.p_value
    assert column.answers_changed == 51


def test_lower_is_better_turns_verdict_and_flips(tmp_path: Path) -> None:
    column = {"higher_is_better": False}
    before = write_results(tmp_path / "a", {"err": scores_of(100, 60)}, column=column)
    after = write_results(tmp_path / "b", {"err": scores_of(100, 20)}, column=column)
    found = compare_results(before, after, resamples=500).columns["err"]
    assert found.verdict == "better"
    assert len(found.improved.doc_ids) == 40


def test_same_answers_cannot_be_told_apart(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"pope": scores_of(100, 50)})
    after = write_results(tmp_path / "b", {"pope": scores_of(100, 50)})
    comparison = compare_results(before, after, resamples=500)
    assert comparison.columns["pope"].verdict == "cannot tell"
    assert comparison.columns["pope"].note is not None
    assert comparison.average is None
    assert "Both runs used the same vision tower." in comparison.warnings


def test_holm_counts_all_columns(tmp_path: Path) -> None:
    tasks = ["a", "b", "c", "d", "e", "f"]
    before = write_results(tmp_path / "a", {task: scores_of(100, 50) for task in tasks})
    after = write_results(
        tmp_path / "b", {task: scores_of(100, 57 if task == "a" else 50) for task in tasks}
    )
    column = compare_results(before, after, resamples=500).columns["a"]
    assert column.p_value == pytest.approx(2 * 0.5**7)
    assert column.p_holm == pytest.approx(6 * 2 * 0.5**7)
    # Significant alone, not among six.
    assert column.verdict == "cannot tell"


def test_average_resamples_within_columns(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"x": scores_of(300, 150), "y": scores_of(300, 150)})
    after = write_results(tmp_path / "b", {"x": scores_of(300, 180), "y": scores_of(300, 165)})
    comparison = compare_results(before, after, resamples=2000)
    average = comparison.average
    assert average is not None
    assert average.difference == pytest.approx(0.075)
    assert average.low is not None
    assert average.high is not None
    variances = [0.1 * 0.9 / 300, 0.05 * 0.95 / 300]
    width = 2 * 1.96 * np.sqrt(sum(variances)) / 2
    assert average.high - average.low == pytest.approx(width, rel=0.1)
    assert average.verdict == "better"
    assert average.columns == ("x", "y")


def test_unpaired_columns_are_reported_without_interval(tmp_path: Path) -> None:
    column = {"paired": False, "reason": "the task gives no score per document", "score": 1.1}
    before = write_results(tmp_path / "a", {"cider": [0.0, 1.0]}, column=column)
    after = write_results(tmp_path / "b", {"cider": [0.0, 1.0]}, column={**column, "score": 1.3})
    found = compare_results(before, after, resamples=500).columns["cider"]
    assert not found.is_paired
    assert found.difference == pytest.approx(0.2)
    assert (found.low, found.p_value, found.verdict) == (None, None, "cannot tell")


def test_failed_samples_are_dropped_from_both_and_reported(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"pope": scores_of(50, 25)}, failed=(0, 1))
    after = write_results(tmp_path / "b", {"pope": scores_of(50, 25)}, failed=(1, 49))
    comparison = compare_results(before, after, resamples=500)
    column = comparison.columns["pope"]
    assert column.dropped == (0, 1, 49)
    assert column.n == 47
    assert column.baseline == pytest.approx(23 / 47)
    assert any("3 questions" in warning for warning in comparison.warnings)


def test_remarks_on_scores_are_repeated_once_for_each_side(tmp_path: Path) -> None:
    column = {"remarks": ["9 of 9 answers are no box and count as wrong"]}
    scores = {"refcoco": [0.0] * 9, "refcocog": [0.0] * 9}
    before = write_results(tmp_path / "a", scores, column=column)
    after = write_results(tmp_path / "b", {name: [1.0] * 9 for name in scores})
    warnings = compare_results(before, after, resamples=100).warnings
    expected = "baseline, refcoco, refcocog: 9 of 9 answers are no box and count as wrong."
    assert [text for text in warnings if "no box" in text] == [expected]


def test_all_samples_failed_leaves_nothing_to_compare(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"pope": [0.0, 1.0]}, failed=(0, 1))
    after = write_results(tmp_path / "b", {"pope": [0.0, 1.0]})
    column = compare_results(before, after, resamples=500).columns["pope"]
    assert column.verdict == "cannot tell"
    assert column.reason == "no document was answered by both runs"


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"x": [1.0, 0.0], "y": [0.0, 0.0]}, per_image=2)
    after = write_results(tmp_path / "b", {"x": [1.0, 1.0], "y": [0.0, 0.5]}, per_image=2)
    content = compare_results(before, after, resamples=500).to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["columns"]["x"]["low"] is None
    assert content["average"]["low"] is None
    assert content["columns"]["x"]["paired"] is True
    assert content["columns"]["x"]["improved"] == {"count": 1, "doc_ids": [1]}


def test_columns_do_not_influence_each_other(tmp_path: Path) -> None:
    soft = [0.3 * (index % 3) for index in range(60)]
    other = [0.3 * (index % 4) for index in range(60)]
    before = write_results(tmp_path / "a", {"x": soft, "y": soft})
    after = write_results(tmp_path / "b", {"x": other, "y": soft})
    alone = write_results(tmp_path / "c", {"x": other})
    full = compare_results(before, after, resamples=500).columns["x"]
    single = compare_results(before, alone, resamples=500, common_only=True).columns["x"]
    assert (full.low, full.high, full.p_value) == (single.low, single.high, single.p_value)


def test_missing_judgements_are_missing_and_in_no_average(tmp_path: Path) -> None:
    paths = []
    for name, right in (("a", 50), ("b", 60)):
        path = write_results(tmp_path / name, {t: scores_of(100, right) for t in ("x", "y", "w")})
        summary = json.loads((path / "summary.json").read_text())
        missing = {"score": None, "paired": False, "reason": "no judge", "missing": "no judge"}
        summary["columns"]["w"] |= {"judged": True, **missing}
        (path / "summary.json").write_text(json.dumps(summary))
        rows = [replace(row, score=None) for row in load_results(path).rows("w")]
        write_rows(path / "samples" / "w.jsonl", rows)
        paths.append(path)
    content = compare_results(*paths, resamples=500).to_json()
    column = content["columns"]["w"]
    assert (column["missing"], column["baseline"], column["difference"]) == ("no judge", None, None)
    assert content["average"]["columns"] == ["x", "y"]
    assert content["average"]["difference"] == pytest.approx(0.1)
    assert content["average"]["excluded"] == {"w": "no judge"}
    # It would be the same number again.
    assert content["average_unjudged"] is None


def test_average_is_given_with_and_without_judged_columns(tmp_path: Path) -> None:
    paths = []
    for name, right in (("a", 50), ("b", 60)):
        scores = {"x": scores_of(100, right), "y": scores_of(100, right), "w": scores_of(100, 50)}
        path = write_results(tmp_path / name, scores)
        summary = json.loads((path / "summary.json").read_text())
        summary["columns"]["w"]["judged"] = True
        (path / "summary.json").write_text(json.dumps(summary))
        paths.append(path)
    comparison = compare_results(*paths, resamples=500)
    assert comparison.average is not None
    assert comparison.average.difference == pytest.approx(0.2 / 3)
    assert comparison.average_unjudged is not None
    assert comparison.average_unjudged.columns == ("x", "y")
    assert comparison.average_unjudged.excluded == {"w": "scored by a judge"}
    alone = write_results(tmp_path / "c", {"x": scores_of(100, 50), "y": scores_of(100, 50)})
    assert compare_results(alone, alone, resamples=100).average_unjudged is None


def test_parts_of_the_columns_have_an_average_of_their_own(tmp_path: Path) -> None:
    paths = []
    for name, gain in (("a", 0), ("b", 10)):
        scores = {t: scores_of(100, 50 + gain * int(t[-1])) for t in ("x0", "y0", "x4", "y4", "z1")}
        path = write_results(tmp_path / name, scores)
        columns = json.loads((path / "summary.json").read_text())["columns"]
        for task in columns:
            columns[task]["part"] = f"{task[-1]} shots"
        paths.append(edit_summary(path, columns=columns))
    content = compare_results(*paths, resamples=500).to_json()
    # One column is no average.
    assert list(content["averages"]) == ["0 shots", "4 shots"]
    assert content["averages"]["4 shots"]["difference"] == pytest.approx(0.4)
    assert content["averages"]["4 shots"]["columns"] == ["x4", "y4"]


def test_pairs_of_images_are_one_answer_each(tmp_path: Path) -> None:
    def rows(right: int, failed: int | None = None) -> list[SampleRow]:
        found = [make_row(i, float(i // 2 < right or i % 2), str(i // 2)) for i in range(60)]
        return [replace(row, failed=row.doc_id == failed) for row in found]

    before = write_rows_of(tmp_path / "a", rows(10), "all_right_in_cluster")
    after = write_rows_of(tmp_path / "b", rows(18, failed=5), "all_right_in_cluster")
    column = compare_results(before, after, resamples=500).columns["t"]
    # Pair 2 is left out as a whole, because one of its questions has no answer.
    assert (column.baseline, column.candidate) == (pytest.approx(9 / 29), pytest.approx(17 / 29))
    assert (column.test, column.p_value) == ("mcnemar", pytest.approx(2 * 0.5**8))
    assert (column.n, column.clusters, column.dropped) == (58, 29, (4, 5))
    assert column.improved.count == 8


def test_ratios_to_the_reference_are_compared_with_each_runs_own_references(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)

    def rows(gain: float) -> list[SampleRow]:
        scores = np.clip(np.round(rng.normal(5 + gain, 1, 60)), 1, 10)
        return [
            make_row(
                i, float(score), str(i), reference=float(rng.integers(7, 10)), group="abc"[i % 3]
            )
            for i, score in enumerate(scores)
        ]

    sides = [rows(0.0), rows(1.5)]
    paths = [
        write_rows_of(tmp_path / name, side, "mean_of_group_ratios", 100)
        for name, side in zip("ab", sides, strict=True)
    ]
    column = compare_results(*paths, resamples=1000).columns["t"]
    expected = []
    for side in sides:
        groups = [[row for row in side if row.group == group] for group in "abc"]
        ratios = [sum(r.score or 0 for r in g) / sum(r.reference or 0 for r in g) for g in groups]
        expected.append(100 * sum(ratios) / 3)
    assert [column.baseline, column.candidate] == [pytest.approx(value) for value in expected]
    assert column.difference == pytest.approx(expected[1] - expected[0])
    assert column.verdict == "better"


def test_areas_are_compared_and_flip_at_one_half(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 120)

    def rows(gap: float) -> list[SampleRow]:
        chances = 1 / (1 + np.exp(-(gap * (2 * labels - 1) + rng.normal(size=120))))
        return [
            make_row(i, float(chance), str(i), label=int(label))
            for i, (chance, label) in enumerate(zip(chances, labels, strict=True))
        ]

    sides = [rows(0.2), rows(2.0)]
    paths = [
        write_rows_of(tmp_path / name, side, "roc_auc", 100)
        for name, side in zip("ab", sides, strict=True)
    ]
    column = compare_results(*paths, resamples=500).columns["t"]
    assert column.difference is not None
    assert column.difference > 15
    assert column.verdict == "better"
    right = [
        {row.doc_id for row in side if ((row.score or 0) > 0.5) == row.label} for side in sides
    ]
    assert set(column.improved.doc_ids) == right[1] - right[0]
    assert set(column.worsened.doc_ids) == right[0] - right[1]


def test_optional_parts_of_a_row_are_kept_and_left_out_where_there_are_none(tmp_path: Path) -> None:
    full = make_row(
        0,
        1.0,
        "c",
        group="g",
        reference=8.0,
        label=1,
        answer_box=(0.0, 0.1, 0.5, 1.0),
        target_box=(0.0, 0.1, 0.4, 1.0),
        image="/d/x.jpg",
    )
    write_rows_of(tmp_path / "a", [full, make_row(1, 0.0, "d")], "mean")
    assert load_results(tmp_path / "a").rows("t") == [full, make_row(1, 0.0, "d")]
    bare = json.loads((tmp_path / "a" / "samples" / "t.jsonl").read_text().splitlines()[1])
    assert set(bare) == {"doc_id", "cluster", "question", "target", "answer", "score", "failed"}


def test_average_over_several_protocols_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = write_results(tmp_path / name, {"x": scores_of(30, 9), "y": scores_of(30, 9)})
        columns = json.loads((path / "summary.json").read_text())["columns"]
        columns["x"]["protocol"] = "paper"
        edit_summary(path, columns=columns)
    average = compare_results(tmp_path / "a", tmp_path / "b", resamples=100).average
    assert average is not None and average.note is not None
    assert "mixes protocols (lmms-eval, paper)" in average.note


def test_mean_of_groups_without_one_of_them_is_not_paired(tmp_path: Path) -> None:
    rows = [make_row(i, float(i % 2), str(i), group="abc"[i % 3]) for i in range(60)]
    before = write_rows_of(tmp_path / "a", rows, "mean_of_groups")
    rows = [replace(row, failed=row.group == "c") for row in rows]
    after = write_rows_of(tmp_path / "b", rows, "mean_of_groups")
    column = compare_results(before, after, resamples=100).columns["t"]
    assert not column.is_paired and column.p_value is None
    assert column.reason == "no document of c was answered by both runs"


def test_columns_about_the_same_images_do_not_narrow_the_average(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before, after = ([float(x) for x in rng.integers(0, 2, 200)] for _ in range(2))
    intervals = []
    for name, tasks in (("one", ["ocr", "other"]), ("same", ["ocr", "pure"])):
        # Two columns that hold the same scores about the same images tell as much as one.
        paths = []
        for side, scores in (("a", before), ("b", after)):
            columns = dict.fromkeys(tasks, scores)
            path = write_results(tmp_path / name / side, columns, per_image=2)
            if name == "one":
                _rename_clusters(path / "samples" / "other.jsonl")
            paths.append(path)
        average = compare_results(*paths).average
        assert average is not None and average.low is not None and average.high is not None
        intervals.append(average.high - average.low)
    column = compare_results(*paths).columns["ocr"]
    assert column.low is not None and column.high is not None
    assert intervals[1] == pytest.approx(column.high - column.low, rel=0.05)
    assert intervals[0] < 0.85 * intervals[1]


def _rename_clusters(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(row | {"cluster": f"other {row['cluster']}"}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
