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
