"""Checkpoints are complete or absent; runs are claimed by one process and resumed by the same."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import types

import pytest
import torch
from transformers import TrainerControl, TrainerState

from kuea_mllm.alignment.identity import identify_run, is_free_key
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe, recipe_to_yaml
from kuea_mllm.errors import EnvironmentFailure, OutputError, RecipeError, UserError
from kuea_mllm.training.checkpoints import (
    CheckpointStore,
    Snapshot,
    first_not_finite,
    host_copy,
    latest_checkpoint,
    read_state,
)
from kuea_mllm.training.interruption import Interruption, SaveCheckpoints
from kuea_mllm.training.run_directory import (
    LOCK,
    compare_recipes,
    open_run,
    require_startable,
    unfinished_path,
)
from kuea_mllm.training.trackers import require_trackers


def snapshot(step, size=3):
    return Snapshot(
        step=step,
        weights={"w": torch.full((size,), float(step))},
        pickles={"optimizer.pt": {"state": torch.zeros(size)}},
        texts={"trainer_state.json": json.dumps({"global_step": step, "max_steps": 90})},
        state={"mark": step, "processes": 1},
    )


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    yield store
    store.close()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_newest_checkpoints_are_kept(store):
    for step in (5, 90, 100):
        store.save(snapshot(step))
    store.wait()
    assert names(store.directory) == ["checkpoint-100", "checkpoint-90"]
    assert store.latest() == store.directory / "checkpoint-100"
    assert read_state(store.latest())["mark"] == 100


def test_best_is_kept_beside_them_and_replaced(store):
    for content in ("one", "two"):

        def write(directory, content=content):
            directory.mkdir()
            (directory / "tower").write_text(content)

        store.save_best(write)
    store.save(snapshot(1))
    store.wait()
    assert names(store.directory) == ["best", "checkpoint-1"]
    assert (store.directory / "best" / "tower").read_text() == "two"


def test_training_goes_on_while_a_checkpoint_is_written(store):
    may_write = threading.Event()
    store.save_best(lambda _: may_write.wait(60))
    store.check()  # neither waits nor fails
    assert store.latest() is None
    may_write.set()
    with pytest.raises(EnvironmentFailure, match="best cannot be written"):
        store.wait()  # nothing was written after all


def test_failed_save_leaves_the_good_one_and_says_so_once(store, monkeypatch):
    store.save(snapshot(1))
    store.wait()

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kuea_mllm.training.checkpoints.torch.save", no_space)
    store.save(snapshot(2))
    with pytest.raises(EnvironmentFailure, match=r"no space left .*checkpoint-2\.\n.*checkpoint-1"):
        store.wait()
    store.check()
    assert names(store.directory) == ["checkpoint-1"]


def test_full_disk_of_a_real_file_system_is_recognised(tmp_path):
    """A limit on file size makes the writes inside safetensors and torch fail."""
    script = (
        "import resource, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_checkpoints import snapshot, CheckpointStore\n"
        "from pathlib import Path\n"
        "import torch\n"
        "store = CheckpointStore(Path(sys.argv[2]), keep=1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "for weights, state in ((100_000, 1), (1, 100_000)):\n"
        "    import dataclasses\n"
        "    one = snapshot(weights + state, size=weights)\n"
        "    one.pickles['optimizer.pt']['state'] = torch.zeros(state)\n"
        "    store.save(one)\n"
        "    try:\n"
        "        store.wait()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error.problem[:13])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), tmp_path / "checkpoints"],  # noqa: PTH120
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["EnvironmentFailure no space left"] * 2, done.stderr
    assert names(tmp_path / "checkpoints") == []


def test_half_written_checkpoints_are_removed_and_best_is_put_back(store):
    for name in (".checkpoint-9.partial", ".checkpoint-2.dropped", ".best.old", "checkpoint-4"):
        (store.directory / name).mkdir(parents=True)
    store.recover()
    assert names(store.directory) == ["best", "checkpoint-4"]


def test_checkpoint_that_lost_bytes_is_refused_by_file(store):
    store.save(snapshot(3))
    store.wait()
    file = store.latest() / "optimizer.pt"
    size = file.stat().st_size
    os.truncate(file, 10)
    with pytest.raises(UserError, match=rf"optimizer\.pt holds 10 of {size} bytes"):
        read_state(store.latest())
    file.unlink()
    with pytest.raises(UserError, match=r"optimizer\.pt is missing"):
        read_state(store.latest())


def test_host_copy_shares_nothing():
    original = {"a": [torch.ones(2), (torch.ones(1), "text")], "n": 3}
    copied = host_copy(original)
    original["a"][0].zero_()
    original["a"][1][0].zero_()
    assert copied["a"][0].tolist() == [1, 1]
    assert copied["a"][1][0].tolist() == [1]
    assert copied["a"][1][1] == "text"
    assert copied["n"] == 3


def test_tensor_that_is_not_finite_is_named():
    good = {"a": torch.ones(2), "count": torch.tensor(1)}
    assert first_not_finite(good) is None
    assert first_not_finite({**good, "b": torch.tensor([1.0, float("inf")])}) == "b"


def recipe(**changes):
    settings = {"student.model": "s", "teacher.model": "t", "data.images": "i"}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return load_recipe("align/miniworld", AlignRecipe, settings={**settings, **changes})


def test_keys_that_cannot_change_the_result_may_change():
    changes = {
        "data__workers": 3,
        "checkpoint__every_minutes": 1.0,
        "runtime__trackers": ["wandb"],
        "runtime__measure_every": 7,
        "student__model": "elsewhere/s",
    }
    changed = compared(recipe(), recipe(**changes))
    assert changed["data.workers"] == (0, 3)
    assert {name.replace("__", ".") for name in changes} >= {
        key.removesuffix(".0") for key in changed
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 1.0),
        ("runtime.device", "cuda"),
        ("runtime.seed", 9),
        ("objective.student_kernel.gamma", 2.0),
        ("data.augment", "flip"),
    ],
)
def test_first_key_that_changes_the_result_is_named(key, value):
    with pytest.raises(RecipeError, match=rf"key '{key}' is {value!r}"):
        compared(recipe(), recipe(**{key: value}))


def test_measuring_more_often_matters_to_early_stopping_only():
    changes = {"monitor__early_stop__patience": 2}
    with pytest.raises(RecipeError, match=r"runtime\.measure_every"):
        compared(recipe(**changes), recipe(**changes, runtime__measure_every=7))


def compared(old, new):
    return compare_recipes(old, new, lambda key: is_free_key(key, new))


def inputs_of(recipe):
    return types.SimpleNamespace(recipe=recipe)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Open a run whose inputs are as stated."""
    fingerprints = {"student": "sha256:s"}
    monkeypatch.setattr(
        "kuea_mllm.alignment.identity._input_fingerprints", lambda _: dict(fingerprints)
    )

    def open_(*, resume=False, restart=False, **changes):
        return open_run(
            tmp_path / "new" / "out",
            identify_run(inputs_of(recipe(**changes))),
            resume=resume,
            restart=restart,
        )

    open_.fingerprints = fingerprints
    open_.out = tmp_path / "new" / "out"
    return open_


class Crash(Exception):
    pass


def crash_after(opened, *steps, **options):
    with pytest.raises(Crash), opened(**options) as run:
        for step in steps:
            run.store.save(snapshot(step))
        raise Crash


def test_complete_run_gets_its_name_and_no_lock(opened):
    with opened() as run:
        assert run.checkpoint is None
        assert not opened.out.exists()
    assert names(opened.out) == ["inputs.json", "run.yaml"]


def test_run_that_failed_before_a_checkpoint_leaves_nothing(opened, tmp_path):
    crash_after(opened)
    assert names(tmp_path) == []


def test_run_that_failed_later_is_kept_and_resumed(opened):
    crash_after(opened, 7)
    with pytest.raises(OutputError, match=r"saved at step 7 of 90.*\n.*--resume.*--restart"):
        require_startable(opened.out, kind="alignment", resume=False, restart=False)
    require_startable(opened.out, kind="alignment", resume=True, restart=False)
    with opened(resume=True) as run:
        assert run.start_step == 7
        assert run.state["mark"] == 7
    assert opened.out.exists()


def test_restart_drops_what_was_there(opened):
    crash_after(opened, 7)
    with opened(restart=True) as run:
        assert run.checkpoint is None
        assert names(run.path) == [LOCK, "inputs.json", "run.yaml"]


def test_resume_without_a_checkpoint_starts_over(opened):
    path = unfinished_path(opened.out)
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("half a r")
    with opened(resume=True) as run:
        assert run.start_step is None
        assert not (path / "metrics.jsonl").exists()


def test_resume_with_nothing_there_is_refused(opened):
    with pytest.raises(OutputError, match="no unfinished run to resume"):
        require_startable(opened.out, kind="alignment", resume=True, restart=False)


def test_other_inputs_are_refused_and_the_run_is_kept(opened):
    crash_after(opened, 7)
    opened.fingerprints["student"] = "sha256:other"
    with pytest.raises(UserError, match="student is not that"), opened(resume=True):
        pass
    opened.fingerprints["student"] = "sha256:s"
    with pytest.raises(RecipeError, match=r"optim\.lr"), opened(resume=True, optim__lr=1.0):
        pass
    with opened(resume=True, data__workers=2) as run:
        assert run.start_step == 7
        # What finishes the run is what it records.
        assert (run.path / "run.yaml").read_text() == recipe_to_yaml(recipe(data__workers=2))


def test_second_process_is_refused_while_the_first_lives(opened):
    crash_after(opened, 7)
    with (unfinished_path(opened.out) / LOCK).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for options in ({"resume": True}, {"restart": True}):
            with pytest.raises(OutputError, match="another process"), opened(**options):
                pass
        with pytest.raises(OutputError, match="another process"):
            require_startable(opened.out, kind="alignment", resume=False, restart=False)
    with opened(resume=True) as run:
        assert run.start_step == 7


def state_at(step):
    return TrainerState(global_step=step, max_steps=100, is_world_process_zero=True)


def test_checkpoints_are_due_by_steps_and_by_the_clock(store):
    now = [0.0]
    saving = SaveCheckpoints(store, every_steps=10, every_minutes=1, clock=lambda: now[0])

    def is_due(step, seconds):
        now[0], control = seconds, TrainerControl()
        saving.on_step_end(None, state_at(step), control)
        if control.should_save:
            saving.on_save(None, state_at(step), control)
        return control.should_save

    assert [is_due(9, 1), is_due(10, 2), is_due(11, 61)] == [False, True, False]
    assert [is_due(12, 62), is_due(13, 63)] == [True, False]


def test_first_signal_saves_and_stops_after_the_step():
    interruption = Interruption()
    before = signal.getsignal(signal.SIGTERM)
    with interruption.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        control = TrainerControl()
        interruption.on_step_end(None, state_at(5), control)
    assert (control.should_save, control.should_training_stop) == (True, True)
    assert (interruption.stopped_at, interruption.exit_code) == (5, 143)
    assert signal.getsignal(signal.SIGTERM) is before


def test_signal_in_the_last_step_lets_the_run_end():
    interruption = Interruption()
    interruption.received = signal.SIGTERM
    control = TrainerControl(should_training_stop=True)
    interruption.on_step_end(None, state_at(100), control)
    assert interruption.stopped_at is None
    assert not control.should_save


def test_signal_of_another_process_stops_this_one_at_an_agreed_step():
    asked = []
    interruption = Interruption(agree=lambda wish: asked.append(wish) or True, every=4)
    control = TrainerControl()
    interruption.on_step_end(None, state_at(3), control)
    assert not control.should_training_stop
    interruption.on_step_end(None, state_at(4), control)
    assert control.should_training_stop
    assert asked == [False]


def test_missing_tracker_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("kuea_mllm.training.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboard, .*\n.*kuea-mllm\[tensorboard\]"):
        require_trackers(["tensorboard"])


def test_nothing_lies_in_a_missing_directory(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
