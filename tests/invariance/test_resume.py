"""A run that was interrupted, by whatever means, equals one that never was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KILLS = 10
PROGRAM = Path(__file__).with_name("resumable_runs.py")
# How long something took differs between any two runs.
TIMES = {"images_per_second", "mfu"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, PROGRAM, folder, str(KILLS), "0"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) == KILLS
    return folder / "whole", folder / "killed"


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if name not in TIMES} for row in rows]


def assert_same(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    elif hasattr(one, "tolist"):
        assert one.tolist() == other.tolist(), where
    else:
        assert one == other, where


def test_run_killed_ten_times_has_the_same_tower(runs):
    whole, killed = (load_file(run / "tower" / "model.safetensors") for run in runs)
    assert_same(whole, killed)
    best, best_killed = (
        load_file(run / "checkpoints" / "best" / "model.safetensors") for run in runs
    )
    assert_same(best, best_killed)


def test_run_killed_ten_times_has_the_same_metrics(runs):
    whole, killed = map(rows_of, runs)
    assert whole == killed
    # Not by accident: rows of losses and of measurements, none twice.
    steps = [row["step"] for row in whole if "loss" in row]
    assert steps == [1, *range(3, 79, 3)]
    assert [row["step"] for row in whole if "heldout_kernel_gap" in row] == [*range(0, 81, 10)]


def test_run_killed_ten_times_has_the_same_last_checkpoint(runs):
    last = [run / "checkpoints" / "checkpoint-78" for run in runs]
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_same(*(torch.load(path / name, weights_only=True) for path in last), name)
    random_states = [torch.load(path / "rng_state.pth", weights_only=False) for path in last]
    assert_same(*random_states, "rng")
    assert_same(*(load_file(path / "model.safetensors") for path in last), "model")
    states = [json.loads((path / "state.json").read_text()) for path in last]
    for state in states:
        del state["seconds"], state["files"], state["resumed_at"]
    assert_same(*states, "state")


def test_manifest_of_a_resumed_run_is_that_of_an_uninterrupted_one(runs):
    whole, killed = (json.loads((run / "tower" / "kuea.json").read_text()) for run in runs)
    assert whole["resumed_at"] == []
    # A resumption that was killed before its first checkpoint leaves no trace.
    assert 0 < len(killed["resumed_at"]) <= KILLS
    assert killed["resumed_at"] == sorted(killed["resumed_at"])
    for manifest in (whole, killed):
        for name in ("command", "created", "seconds", "resumed_at"):
            del manifest[name]
    assert whole == killed


def test_nothing_is_left_of_the_kills(runs):
    _, killed = runs
    assert sorted(path.name for path in killed.parent.iterdir()) == [
        "clip", "images", "killed", "teacher", "whole",
    ]  # fmt: skip
    checkpoints = [path.name for path in (killed / "checkpoints").iterdir()]
    assert sorted(checkpoints) == ["best", "checkpoint-76", "checkpoint-78"]
