"""`kuea-mllm align --num-processes`: the same result, one voice, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def start(arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "kuea_mllm", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def ranks_of(parent):
    """Process ids by rank, as the launcher's children have it in their environment."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((v for v in environment if v.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank[5:])] = int(child)
    return found


def wait_until(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"waited {seconds} s in vain: {process.communicate()}")


def is_gone(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def endless(align_arguments, tmp_path):
    """A run of two processes that saves itself often and is never done."""
    return [
        *align_arguments,
        "--steps=100000",
        "--num-processes=2",
        "--workers=0",
        "--set=checkpoint.every_steps=2",
        "--set=runtime.log_every=1",
    ]


def has_checkpoint(tmp_path):
    return any((tmp_path / "out.unfinished" / "checkpoints").glob("checkpoint-*"))


def test_two_processes_write_the_tower_of_one(kuea, align_arguments, tmp_path):
    run = [*align_arguments, "--steps=20", "--set=optim.warmup_steps=4", "--workers=0"]
    alone = [argument for argument in run if not argument.startswith("--out")]
    assert kuea(*alone, f"--out={tmp_path / 'one'}").code == 0
    code, out, err = finish(start([*run, "--num-processes=2"]))
    assert code == 0, err
    assert out.count("aligned tower") == 1
    found = load_file(tmp_path / "out" / "tower" / "model.safetensors")
    expected = load_file(tmp_path / "one" / "tower" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("k_proj.bias"):  # a zero gradient: nothing but rounding noise
            continue
        error = torch.linalg.norm(found[name] - value) / torch.linalg.norm(value)
        assert error <= 1e-6, f"{name}: {error:.2g}"
    assert "--num-processes=2" in (tmp_path / "out" / "tower" / "kuea.json").read_text()


def test_error_that_all_processes_meet_is_printed_once(align_arguments, tmp_path):
    student = tmp_path / "student"
    student.mkdir()
    code, out, err = finish(start([*align_arguments, "--num-processes=2", f"--student={student}"]))
    assert code == 2
    assert err.count("error: ") == 1
    assert str(student) in err
    assert "Traceback" not in err + out
    assert "elastic" not in err + out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


def test_killed_process_ends_the_others_with_one_line(endless, tmp_path):
    process = start(endless)
    wait_until(lambda: has_checkpoint(tmp_path), process)
    ranks = ranks_of(process.pid)
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = finish(process, seconds=60)
    assert time.monotonic() - killed < 30
    assert code == 1
    assert err.count("error: ") == 1
    assert "process 1 was killed by SIGKILL" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert is_gone(ranks[0])
    assert has_checkpoint(tmp_path)

    # What it says works: the run goes on where it was saved.
    resumed = start([*endless, "--resume"])
    wait_until(
        lambda: "resumed from" in (tmp_path / "out.unfinished" / "run.log").read_text(), resumed
    )
    resumed.send_signal(signal.SIGTERM)
    assert finish(resumed, seconds=120)[0] == 143


def test_signal_to_the_parent_saves_and_ends_all(endless, tmp_path):
    process = start(endless)
    log = tmp_path / "out.unfinished" / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 3, process)
    ranks = ranks_of(process.pid)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process, seconds=120)
    assert code == 130
    assert err.count("error: ") == 1
    assert "interrupted at step" in err
    assert "--num-processes=2" in err
    assert "--resume" in err
    assert all(is_gone(rank) for rank in ranks.values())
    assert has_checkpoint(tmp_path)


def test_batch_that_does_not_divide_is_refused_before_anything_starts(kuea, align_arguments):
    answer = kuea(*align_arguments, "--num-processes=3")
    assert answer.code == 2
    assert "optim.batch_size 16 does not divide among 3 processes" in answer.err


def test_num_processes_under_torchrun_is_refused(kuea, align_arguments, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    answer = kuea(*align_arguments, "--num-processes=2")
    assert answer.code == 2
    assert "torchrun" in answer.err
    assert "(one of 4)" in answer.err


def test_plain_torchrun_works(align_arguments, tmp_path):
    command = [
        *("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
        *("-m", "kuea_mllm", *align_arguments, "--workers=0"),
    ]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("aligned tower") == 1
    assert (tmp_path / "out" / "tower" / "model.safetensors").exists()
