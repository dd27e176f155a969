from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.columns import fingerprint_rows
from kuea_mllm.evaluation.compare import compare_results
from kuea_mllm.evaluation.results import SampleRow, load_results, write_rows
from kuea_mllm.evaluation.session import FAILED_ANSWER
from kuea_mllm.io import write_json


def write_results(
    path: Path,
    scores: dict[str, list[float]],
    *,
    failed: tuple[int, ...] = (),
    per_image: int = 1,
    column: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    tower: str = "aaa",
) -> Path:
    columns = {}
    for task, values in scores.items():
        rows = [
            SampleRow(
                doc_id=index,
                cluster=str(index // per_image),
                question=f"question {index}",
                target="yes",
                answer=FAILED_ANSWER if index in failed else f"answer {score}",
                score=score,
                failed=index in failed,
            )
            for index, score in enumerate(values)
        ]
        write_rows(path / "samples" / f"{task}.jsonl", rows)
        columns[task] = {
            "task": task,
            "version": 1.0,
            "metric": "accuracy",
            "filter": "none",
            "score": float(np.mean(values)),
            "scale": 1,
            "stderr": None,
            "higher_is_better": True,
            "n": len(rows),
            "failed": len(failed),
            "clusters": len({row.cluster for row in rows}),
            "paired": True,
            "reason": None,
            "samples": f"samples/{task}.jsonl",
            "dataset_fingerprint": fingerprint_rows(rows),
            **(column or {}),
        }
    summary = {
        "schema_version": 1,
        "kind": "results",
        "model": {"path": "m", "name": "m", "adapter": "llava", "tower_fingerprint": tower},
        "columns": columns,
        "settings": {"limit": None, "dtype": "float32", "seed": 0, **(settings or {})},
        "versions": {"torch": "2", "transformers": "5"},
        "created": "2026-01-01T00:00:00+00:00",
    }
    write_json(path / "summary.json", summary)
    return path


def scores_of(count: int, right: int) -> list[float]:
    return [1.0] * right + [0.0] * (count - right)


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


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"version": 2.0}, "pope: the two runs have different task versions: 1.0 and 2.0"),
        ({"metric": "f1"}, "different metrics: 'accuracy' and 'f1'"),
        ({"filter": "strict"}, "different answer filters"),
        ({"dataset_fingerprint": "0" * 64}, "different sample sets"),
        ({"higher_is_better": False}, "different directions"),
    ],
)
def test_different_tests_are_refused(tmp_path: Path, column: dict[str, Any], message: str) -> None:
    before = write_results(tmp_path / "a", {"pope": scores_of(10, 5)})
    after = write_results(tmp_path / "b", {"pope": scores_of(10, 5)}, column=column)
    with pytest.raises(EvaluationError, match=message):
        compare_results(before, after)


def test_different_limits_and_sizes_are_refused(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"pope": scores_of(10, 5)})
    limited = write_results(tmp_path / "b", {"pope": scores_of(8, 5)}, settings={"limit": 8})
    with pytest.raises(EvaluationError, match=r"different limits: None in .*, 8 in"):
        compare_results(before, limited)
    smaller = write_results(tmp_path / "c", {"pope": scores_of(8, 5)})
    with pytest.raises(EvaluationError, match="different numbers of samples: 10 and 8"):
        compare_results(before, smaller)


def test_lonely_columns_are_refused_unless_asked_for(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"x": scores_of(10, 5), "old": scores_of(10, 5)})
    after = write_results(tmp_path / "b", {"x": scores_of(10, 5), "new": scores_of(10, 5)})
    with pytest.raises(EvaluationError, match=r"old only in .*/a; new only in .*/b"):
        compare_results(before, after)
    comparison = compare_results(before, after, resamples=500, common_only=True)
    assert list(comparison.columns) == ["x"]
    assert comparison.only_in_baseline == ("old",)
    assert comparison.only_in_candidate == ("new",)
    other = write_results(tmp_path / "c", {"z": scores_of(10, 5)})
    with pytest.raises(EvaluationError, match="no column in common"):
        compare_results(before, other, common_only=True)


def test_columns_do_not_influence_each_other(tmp_path: Path) -> None:
    soft = [0.3 * (index % 3) for index in range(60)]
    other = [0.3 * (index % 4) for index in range(60)]
    before = write_results(tmp_path / "a", {"x": soft, "y": soft})
    after = write_results(tmp_path / "b", {"x": other, "y": soft})
    alone = write_results(tmp_path / "c", {"x": other})
    full = compare_results(before, after, resamples=500).columns["x"]
    single = compare_results(before, alone, resamples=500, common_only=True).columns["x"]
    assert (full.low, full.high, full.p_value) == (single.low, single.high, single.p_value)


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not exist"):
        load_results(tmp_path / "none")
    with pytest.raises(EvaluationError, match=r"summary.json is missing"):
        load_results(tmp_path)
    path = write_results(tmp_path / "a", {"pope": scores_of(4, 2)})
    samples = path / "samples" / "pope.jsonl"
    whole = samples.read_text()
    samples.write_text("".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(EvaluationError, match="holds 3 samples, the summary says 4"):
        load_results(path).rows("pope")
    samples.write_text(whole[:-20])
    with pytest.raises(EvaluationError, match="line 4 is not a sample row"):
        load_results(path).rows("pope")
    write_json(path / "summary.json", {"kind": "results", "schema_version": 9})
    with pytest.raises(EvaluationError, match="schema version 9"):
        load_results(path)
    write_json(path / "summary.json", {"kind": "comparison"})
    with pytest.raises(EvaluationError, match="not a summary of results"):
        load_results(path)


def test_other_versions_and_few_shot_protocols_are_said(tmp_path: Path) -> None:
    paths = [write_results(tmp_path / name, {"pope": scores_of(20, 10)}) for name in "ab"]
    for path, version, penalty in zip(paths, ("0.7.3", "0.8.0"), (0.0, -2.0), strict=True):
        summary = json.loads((path / "summary.json").read_text())
        summary["versions"]["lmms_eval"] = version
        summary["fewshot"] = {"compat": "paper", "length_penalty": penalty}
        (path / "summary.json").write_text(json.dumps(summary))
    warnings = " ".join(compare_results(*paths, resamples=100).warnings)
    assert "lmms_eval 0.7.3 and 0.8.0" in warnings
    assert "length_penalty (0.0 and -2.0)" in warnings
