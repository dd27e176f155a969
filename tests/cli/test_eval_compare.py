"""`kuea-mllm eval` and `compare`: what they refuse before any weights are loaded."""

import json

import pytest

from kuea_mllm.miniworld import ASSETS


@pytest.fixture
def arguments(tmp_path):
    task = tmp_path / "tasks" / "mini.yaml"
    task.parent.mkdir()
    task.write_text("task: mini\ndataset_path: json\n")
    return ["eval", f"--model={ASSETS / 'llava'}", f"--tasks={task}", f"--out={tmp_path / 'out'}"]


def test_dry_run_checks_and_writes_nothing(kuea, arguments, tmp_path):
    answer = kuea(*arguments, "--dry-run", "--json", "--batch-size=4")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["batch_size"] == 4
    assert not (tmp_path / "out").exists()


BAD = {
    "missing model": (["--model=no/such/model"], "no/such/model"),
    "model is a tower": ([f"--model={ASSETS / 'clip'}"], "clip"),
    "missing task file": (["--tasks=./nowhere.yaml"], "nowhere.yaml"),
    "unknown dtype": (["--dtype=float8"], "dtype"),
    "unknown key": (["--set=batchsize=3"], "batch_size"),
    "device that is not there": (["--device=mps"], "mps"),
    "recipe of another kind": (["--recipe=align/miniworld"], "align/miniworld"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_ends_in_one_clear_line(kuea, arguments, tmp_path, name):
    options, expected = BAD[name]
    answer = kuea(*arguments, *options, "--dry-run")
    assert answer.code == 2
    assert expected in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_nothing_to_evaluate_on_is_refused(kuea, tmp_path):
    answer = kuea("eval", f"--model={ASSETS / 'llava'}", f"--out={tmp_path / 'out'}")
    assert answer.code == 2
    assert "--tasks" in answer.err


def test_existing_output_is_refused(kuea, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    answer = kuea(*arguments)
    assert answer.code == 2
    assert "exists already" in answer.err


def test_compare_refuses_what_are_no_results(kuea, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    answer = kuea("compare", tmp_path / "a", tmp_path / "b")
    assert answer.code == 2
    assert "summary.json" in answer.err


def test_debug_shows_the_traceback_and_keeps_the_exit_code(kuea, tmp_path):
    answer = kuea("--debug", "compare", tmp_path / "a", tmp_path / "b")
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert "error: " in answer.err


def write_run(folder, right):
    """Write a results directory of one column, of which `right` of 40 answers are right."""
    from kuea_mllm.evaluation.columns import fingerprint_rows
    from kuea_mllm.evaluation.results import SCHEMA_VERSION, SampleRow, write_rows
    from kuea_mllm.io import write_json

    scores = [float(number < right) for number in range(40)]
    rows = [
        SampleRow(number, str(number), "q", "t", f"{score}", score, failed=False)
        for number, score in enumerate(scores)
    ]
    write_rows(folder / "samples" / "vsr.jsonl", rows)
    column = {"task": "vsr", "column": "vsr", "suite": None, "protocol": "paper", "metric": "acc"}
    column |= {"statistic": "mean", "judged": False, "version": 1, "filter": "none", "split": None}
    column |= {"higher_is_better": True, "scale": 1, "n": 40, "failed": 0, "clusters": 40}
    column |= {"paired": True, "reason": None, "missing": None, "samples": "samples/vsr.jsonl"}
    column |= {"score": right / 40, "stderr": None, "dataset_fingerprint": fingerprint_rows(rows)}
    model = {"path": "m", "name": folder.name, "adapter": "llava", "tower_fingerprint": folder.name}
    summary = {"schema_version": SCHEMA_VERSION, "kind": "results", "model": model}
    summary |= {"columns": {"vsr": column}, "settings": {"limit": None}, "versions": {}}
    write_json(folder / "summary.json", summary | {"created": ""})
    return folder


def test_compare_prints_one_answer_in_every_format(kuea, tmp_path):
    runs = [
        write_run(tmp_path / name, right) for name, right in zip("abc", (10, 30, 5), strict=True)
    ]
    answers = {}
    for name in ("text", "markdown", "latex", "json"):
        answer = kuea("compare", *runs[:2], f"--format={name}", "--resamples=200")
        assert answer.code == 0, answer.err
        answers[name] = answer.out
    found = json.loads(answers["json"])["columns"]["vsr"]
    assert (found["verdict"], found["difference"]) == ("better", 0.5)
    for name in ("text", "markdown", "latex"):
        assert "+50.0 " in answers[name], name
    assert answers["latex"].startswith("% needs")
    assert answers["markdown"].count("|") > 20
    assert json.loads(kuea("compare", *runs[:2], "--json", "--resamples=200").out) == json.loads(
        answers["json"]
    )


def test_compare_takes_labels_and_several_candidates(kuea, tmp_path):
    runs = [
        write_run(tmp_path / name, right)
        for name, right in zip("abcd", (10, 30, 5, 12), strict=True)
    ]
    answer = kuea(
        "compare", f"old={runs[0]}", f"new={runs[1]}", f"new={runs[2]}", runs[3], "--format=json"
    )
    assert answer.code == 0, answer.err
    pairs = json.loads(answer.out)["pairs"]
    assert [pair["candidate"]["label"] for pair in pairs] == ["new", None]
    assert pairs[0]["columns"]["vsr"]["seeds"]["count"] == 2
    answer = kuea("compare", f"old={runs[0]}", f"old={runs[1]}")
    assert answer.code == 2
    assert "'old'" in answer.err
