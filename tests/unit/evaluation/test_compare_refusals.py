"""Runs that did not take the same test are refused, by name; what may differ is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare_data import edit_summary, make_row, scores_of, write_results, write_rows_of

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.evaluation.comparing.systems import load_systems
from kuea_mllm.evaluation.results import load_results, write_rows
from kuea_mllm.io import read_json, write_json
from kuea_mllm.workflows.probe_results import SUITE_PREFIX


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {"version": 2.0},
            r"pope: the two runs have different task versions: 1.0 in .*/a/summ.*, 2.0 in .*/b/",
        ),
        ({"metric": "f1"}, "different metrics: 'accuracy' in .*, 'f1' in "),
        ({"filter": "strict"}, "different answer filters"),
        ({"dataset_fingerprint": "0" * 64}, "different sample sets"),
        ({"higher_is_better": False}, "different directions"),
        (
            {"protocol": "padded"},
            r"different protocols: 'lmms-eval' in .*, 'padded' in .*--protocol",
        ),
        ({"split": "val"}, "different splits: 'test' in .*, 'val' in"),
        ({"statistic": "mean_of_groups"}, "different statistics"),
        ({"judged": True}, "different ways of scoring"),
    ],
)
def test_different_tests_are_refused(tmp_path: Path, column: dict[str, Any], message: str) -> None:
    before = write_results(tmp_path / "a", {"pope": scores_of(10, 5)})
    after = write_results(tmp_path / "b", {"pope": scores_of(10, 5)}, column=column)
    with pytest.raises(EvaluationError, match=f"(?s){message}"):
        compare_results(before, after)


def test_different_limits_and_sizes_are_refused(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"pope": scores_of(10, 5)})
    limited = write_results(tmp_path / "b", {"pope": scores_of(8, 5)}, settings={"limit": 8})
    with pytest.raises(EvaluationError, match=r"different limits: None in .*, 8 in"):
        compare_results(before, limited)
    smaller = write_results(tmp_path / "c", {"pope": scores_of(8, 5)})
    with pytest.raises(EvaluationError, match=r"different numbers of samples: 10 in .*, 8 in"):
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
    # What tells them apart is the protocol, which is in the tasks' names.
    here = write_results(tmp_path / "d", {"paper_x": scores_of(4, 2)})
    there = write_results(tmp_path / "e", {"padded_x": scores_of(4, 2)})
    for path, task, protocol in ((here, "paper_x", "paper"), (there, "padded_x", "padded")):
        summary = read_json(path / "summary.json")
        summary["columns"][task] |= {"column": "x", "protocol": protocol}
        write_json(path / "summary.json", summary)
    with pytest.raises(EvaluationError, match="different protocols: 'paper' in"):
        compare_results(here, there, common_only=True)


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
    first, *others = whole.splitlines(keepends=True)
    samples.write_text("".join([first, first, *others[1:]]))
    with pytest.raises(EvaluationError, match=r"pope\.jsonl holds document 0 2 times"):
        load_results(path).rows("pope")
    write_json(path / "summary.json", {"kind": "results", "schema_version": 9})
    with pytest.raises(EvaluationError, match="schema version 9"):
        load_results(path)
    write_json(path / "summary.json", {"kind": "comparison"})
    with pytest.raises(EvaluationError, match="not a summary of results"):
        load_results(path)


def test_other_versions_are_said(tmp_path: Path) -> None:
    paths = [write_results(tmp_path / name, {"pope": scores_of(20, 10)}) for name in "ab"]
    edit_summary(paths[0], versions={"lmms_eval": "0.7.3"})
    edit_summary(paths[1], versions={"lmms_eval": "0.8.0"})
    warnings = " ".join(compare_results(*paths, resamples=100).warnings)
    assert "lmms_eval 0.7.3 and 0.8.0" in warnings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit_seed": 1}, r"different seeds of the limit: None in .*/a/summary.json, 1 in .*/b/"),
        ({"limit": 8}, "different limits"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    limited = {"limit": 9}
    before = write_results(tmp_path / "a", {"pope": scores_of(20, 10)}, settings=limited)
    changes = limited | changes
    after = write_results(tmp_path / "b", {"pope": scores_of(20, 10)}, settings=changes)
    with pytest.raises(EvaluationError, match=message):
        compare_results(before, after)


def test_seed_of_a_limit_is_nothing_without_a_limit(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"x": scores_of(20, 9)}, settings={"limit_seed": 0})
    after = write_results(tmp_path / "b", {"x": scores_of(20, 10)})
    assert list(compare_results(before, after, resamples=200).columns) == ["x"]


def test_evaluation_is_not_compared_with_a_probe(tmp_path: Path) -> None:
    settings = {"suite": "probe-zero-shot", "limit": 9}
    probe = write_results(tmp_path / "a", {"CIFAR10": scores_of(4, 2)}, settings=settings)
    evaluation = write_results(tmp_path / "b", {"pope": scores_of(4, 2)})
    for pair, message in (
        ((probe, evaluation), r"/a holds results of `kuea-mllm probe`, .*/b of `kuea-mllm eval`"),
        ((evaluation, probe), r"/b holds results of `kuea-mllm eval`, .*/a of `kuea-mllm probe`"),
    ):
        with pytest.raises(EvaluationError, match=message):
            compare_results(*pair, common_only=True)


def test_suites_and_columns_are_named_before_limits(tmp_path: Path) -> None:
    here = {"suite": "probe-zero-shot"}
    there = {"suite": "probe-linear", "limit": 9}
    first = write_results(tmp_path / "a", {"x": scores_of(4, 2)}, settings=here)
    second = write_results(tmp_path / "b", {"y": scores_of(4, 2)}, settings=there)
    with pytest.raises(
        EvaluationError, match=r"(?s)suites, and no .* 'probe-zero-shot' in .*Probe both .*--suite"
    ):
        compare_results(first, second)
    both = {"x": scores_of(4, 2), "z": scores_of(4, 2)}
    third = write_results(tmp_path / "c", both, settings=here | {"limit": 9})
    with pytest.raises(EvaluationError, match=r"(?s)z only in .*/c.*Probe the missing data sets"):
        compare_results(first, third)
    with pytest.raises(EvaluationError, match=r"(?s)different limits: None .*Probe both .*--limit"):
        compare_results(first, third, common_only=True)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"protocol": "released"}, r"different protocols: 'lmms-eval' in .*same --compat"),
        ({"version": "2"}, r"different task versions: .*probe both with the same recipe and data"),
    ],
)
def test_remedies_of_probes_name_what_probe_has(
    tmp_path: Path, column: dict[str, Any], message: str
) -> None:
    settings = {"suite": f"{SUITE_PREFIX}zero-shot"}
    before = write_results(tmp_path / "a", {"x": scores_of(9, 5)}, settings=settings)
    after = write_results(tmp_path / "b", {"x": scores_of(9, 5)}, settings=settings, column=column)
    with pytest.raises(EvaluationError, match=f"(?s){message}"):
        compare_results(before, after)


@pytest.mark.parametrize("key", ["compat", "demonstrations", "length_penalty"])
def test_other_few_shot_protocols_are_refused(tmp_path: Path, key: str) -> None:
    paths = [write_results(tmp_path / name, {"pope": scores_of(20, 10)}) for name in "ab"]
    for path, value in zip(paths, ("x", "y"), strict=True):
        edit_summary(
            path, fewshot={"compat": 0, "demonstrations": 0, "length_penalty": 0, key: value}
        )
    with pytest.raises(EvaluationError, match=rf"few-shot protocols \({key}\): 'x' in"):
        compare_results(*paths)


def test_protocols_are_named_where_tasks_have_other_names_because_of_them(tmp_path: Path) -> None:
    paths = []
    for name, protocol in (("a", "paper"), ("b", "padded")):
        column = {"column": "RefCOCO", "protocol": protocol}
        task = f"kuea_{protocol}_refcoco"
        paths.append(write_results(tmp_path / name, {task: scores_of(9, 5)}, column=column))
    with pytest.raises(
        EvaluationError, match=r"column RefCOCO: .* protocols: 'paper' in .*, 'padd"
    ):
        compare_results(*paths)


def test_other_number_formats_and_backends_are_said(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {"pope": scores_of(20, 10)}, settings={"backend": "x"})
    after = write_results(
        tmp_path / "b", {"pope": scores_of(20, 10)}, settings={"dtype": "bf16", "backend": "vllm"}
    )
    warnings = " ".join(compare_results(before, after, resamples=100).warnings)
    assert "differ in dtype (float32 and bf16)" in warnings
    assert "differ in backend (x and vllm)" in warnings


def test_other_judges_are_refused_and_other_addresses_are_not(tmp_path: Path) -> None:
    column = {"judged": True}
    judge = {"url": "http://a", "model": "m", "prompt": "p"}
    first = write_results(
        tmp_path / "a", {"wild": scores_of(20, 10)}, column=column, settings={"judge": judge}
    )
    moved = write_results(
        tmp_path / "b",
        {"wild": scores_of(20, 10)},
        column=column,
        settings={"judge": judge | {"url": "http://b"}},
    )
    assert compare_results(first, moved, resamples=100).columns["wild"].judged
    other = write_results(
        tmp_path / "c",
        {"wild": scores_of(20, 10)},
        column=column,
        settings={"judge": judge | {"model": "n"}},
    )
    with pytest.raises(
        EvaluationError, match=r"column wild: .* judges \(model\): 'm' in .*, 'n' in"
    ):
        compare_results(first, other)
    warmer = edit_summary(moved, settings={"limit": None, "judge": judge | {"temperature": 0.2}})
    with pytest.raises(EvaluationError, match=r"judges \(temperature\): None in .*, 0.2 in"):
        compare_results(first, warmer)


def test_rows_of_other_groups_are_refused(tmp_path: Path) -> None:
    before = write_rows_of(tmp_path / "a", [make_row(i, 1.0, str(i)) for i in range(4)], "mean")
    after = write_rows_of(tmp_path / "b", [make_row(i, 1.0, "one") for i in range(4)], "mean")
    with pytest.raises(
        EvaluationError, match=r"document 0 has cluster '0' in .*/a/samples/t.jsonl"
    ):
        compare_results(before, after)


def test_arguments_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    path = write_results(tmp_path / "a=b", {"x": scores_of(10, 5)})
    other = write_results(tmp_path / "c", {"x": scores_of(10, 5)})
    assert [system.label for system in load_systems([f"{path}", f"n={other}"])] == [None, "n"]
    for arguments, message in (
        ([path], "1 results directory is given"),
        ([f"n={path}", f"n={other}"], "all results have the label 'n'"),
        ([path, f"n={path}"], "given twice"),
    ):
        with pytest.raises(EvaluationError, match=message):
            load_systems([*map(str, arguments)])


def test_results_of_the_last_version_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = edit_summary(write_results(tmp_path / "a", {"x": scores_of(4, 2)}), schema_version=1)
    with pytest.raises(EvaluationError, match=r"(?s)schema version 1, .* reads 2.*Evaluate again"):
        load_results(path)


@pytest.mark.parametrize(
    "samples", ["../b/samples/x.jsonl", "/srv/x.jsonl", "samples/..", "x.jsonl"]
)
def test_samples_that_lie_elsewhere_are_refused(samples: str, tmp_path: Path) -> None:
    # Results may come from somebody else, and `judge` writes where the samples are.
    path = write_results(tmp_path / "a", {"x": scores_of(10, 5)}, column={"samples": samples})
    with pytest.raises(EvaluationError, match=r"the samples of column x are .*samples/ beside it"):
        load_results(path)


def test_summary_without_columns_is_refused(tmp_path: Path) -> None:
    path = write_results(tmp_path / "a", {"x": scores_of(10, 5)})
    edit_summary(path, columns=None)
    with pytest.raises(EvaluationError, match=r"summary.json has no columns"):
        load_results(path)


def test_rows_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "x.jsonl"
    write_rows(path, [make_row(0, 1.0, "a"), make_row(1, 1.0, "b")])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Out of range"):
        write_rows(path, [make_row(0, 1.0, "a"), make_row(1, float("nan"), "b")])
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("score", ["NaN", '"1"', "[1]"])
def test_score_that_is_no_number_is_refused(score: str, tmp_path: Path) -> None:
    path = write_results(tmp_path / "a", {"x": scores_of(2, 1)})
    samples = path / "samples" / "x.jsonl"
    samples.write_text(samples.read_text().replace('"score": 1.0', f'"score": {score}'))
    with pytest.raises(EvaluationError, match=r"x.jsonl, line 1 is not a sample row: score is"):
        load_results(path).rows("x")
