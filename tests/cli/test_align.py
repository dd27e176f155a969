"""`kuea-mllm align`: what it writes, and what it says about bad input."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    CLIPVisionModelWithProjection,
)

from kuea_mllm.miniworld import ASSETS


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_align_writes_a_complete_run(kuea, align_arguments, tmp_path):
    answer = kuea(*align_arguments, "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    out = tmp_path / "out"
    assert leftovers(tmp_path) == ["out"]
    assert {"figures", "metrics.jsonl", "run.log", "run.yaml", "tower"} <= set(leftovers(out))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "loss_kernel", "loss_preserve", "lr", "kernel_gamma"} <= set(rows[1])
    assert result["after"]["heldout_kernel_gap"] != result["before"]["heldout_kernel_gap"]

    tower = CLIPVisionModelWithProjection.from_pretrained(out / "tower")
    original = load_file(ASSETS / "clip" / "model.safetensors")
    changed = tower.state_dict()["visual_projection.weight"]
    assert not changed.equal(original["visual_projection.weight"])
    AutoImageProcessor.from_pretrained(out / "tower")
    manifest = json.loads((out / "tower" / "kuea.json").read_text())
    assert manifest["base_tower"]["fingerprint"] != manifest["fingerprint"]
    assert manifest["kernel"]["initial"] != manifest["kernel"]["final"]


def test_saved_recipe_repeats_the_run_bit_for_bit(kuea, align_arguments, tmp_path):
    assert kuea(*align_arguments).code == 0
    again = kuea(
        "align", f"--recipe={tmp_path / 'out' / 'run.yaml'}", f"--out={tmp_path / 'again'}"
    )
    assert again.code == 0, again.err
    first = load_file(tmp_path / "out" / "tower" / "model.safetensors")
    second = load_file(tmp_path / "again" / "tower" / "model.safetensors")
    assert all(first[name].equal(second[name]) for name in first)


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(kuea, align_arguments, tmp_path):
    answer = kuea(*align_arguments, "--dry-run")
    assert answer.code == 0, answer.err
    recipe = yaml.safe_load(answer.out)
    assert recipe["objective"]["student_kernel"]["trainable"] is True
    assert recipe["optim"]["first_update_at_full_lr"] is False
    assert leftovers(tmp_path) == []


def test_compat_released_is_resolved_into_its_switches(kuea, align_arguments):
    answer = kuea(*align_arguments, "--dry-run", "--set=compat=released")
    recipe = yaml.safe_load(answer.out)
    assert recipe["objective"]["student_kernel"]["trainable"] is False
    assert recipe["optim"]["first_update_at_full_lr"] is True
    assert recipe["teacher"]["normalisation"] == "student"


BAD_OPTIONS = {
    "missing image folder": (["--images=no/such/folder"], "no/such/folder", "does not exist"),
    "image folder is a file": ([f"--images={__file__}"], __file__, "of an unknown kind"),
    "unknown recipe": (["--recipe=align/miniwrld"], "align/miniworld"),
    "unknown key": (["--set=optim.learning_rate=1"], "optim.learning_rate", "unknown key"),
    "wrong type": (["--set=optim.lr=fast"], "optim.lr", "'fast'"),
    "out of range": (["--set=optim.lr=-1"], "optim.lr", "greater than 0"),
    "warm-up longer than the run": (["--set=optim.warmup_steps=9"], "optim.warmup_steps (9)"),
    "nothing to learn": (["--set=objective.kernel_weight=0"], "every weight that pulls"),
    "batch larger than the data": (["--batch-size=4096"], "images", "one batch of 4096"),
    "student that does not exist": (["--student=./nowhere"], "./nowhere"),
    "device that does not exist": (["--device=mps"], "mps"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option_ends_in_one_clear_line(kuea, align_arguments, tmp_path, name):
    options, *expected = BAD_OPTIONS[name]
    answer = kuea(*align_arguments, *options)
    assert answer.code == 2
    assert answer.err.count("error: ") == 1
    assert "Traceback" not in answer.err
    for text in expected:
        assert text in answer.err
    assert leftovers(tmp_path) == []


def test_folder_without_images_is_refused(kuea, align_arguments, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no picture")
    answer = kuea(*align_arguments, f"--images={empty}")
    assert answer.code == 2
    assert f"{empty} holds no image" in answer.err
    assert leftovers(tmp_path) == ["empty"]


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg_is_named(kuea, align_arguments, pictures, tmp_path, workers):
    folder = tmp_path / "images"
    shutil.copytree(pictures, folder)
    broken = folder / "00" / "broken.jpg"
    Image.effect_noise((64, 64), 50).convert("RGB").save(broken)
    broken.write_bytes(broken.read_bytes()[:-200])
    # A whole epoch, so that the broken picture is met; a folder of its own to measure on.
    answer = kuea(
        *align_arguments,
        f"--images={folder}",
        f"--heldout={pictures}",
        "--steps=8",
        f"--set=data.workers={workers}",
    )
    assert answer.code == 1
    assert answer.err.count("cannot be read") == 1
    assert "Traceback" not in answer.err
    assert str(broken) in answer.err
    assert "cannot be read" in answer.err
    assert leftovers(tmp_path) == ["images"]

    found = kuea("doctor", f"--images={folder}")
    assert found.code == 1
    assert str(broken) in found.out.replace("\n", "")


def test_teacher_that_is_no_vision_model_is_refused(kuea, align_arguments, tmp_path):
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    answer = kuea(*align_arguments, f"--teacher={tmp_path / 'bert'}")
    assert answer.code == 2
    assert "bert" in answer.err
    assert leftovers(tmp_path) == ["bert"]


def test_state_dict_without_activation_is_refused(kuea, align_arguments, tmp_path):
    visual = tmp_path / "visual.safetensors"
    assert kuea("convert", ASSETS / "clip", visual, "--to=visual").code == 0
    answer = kuea(*align_arguments, f"--student={visual}", "--heads=2")
    assert answer.code == 2
    assert "--activation" in answer.err
    stated = kuea(*align_arguments, f"--student={visual}", "--heads=2", "--activation=quick_gelu")
    assert stated.code == 0, stated.err


def test_existing_output_is_refused(kuea, align_arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    answer = kuea(*align_arguments)
    assert answer.code == 2
    assert "exists already" in answer.err
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_full_disk_ends_in_one_line_and_leaves_nothing(
    kuea, align_arguments, tmp_path, monkeypatch
):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kuea_mllm.alignment.run.save_tower", no_space)
    answer = kuea(*align_arguments)
    assert answer.code == 1
    assert "no space left" in answer.err
    assert leftovers(tmp_path) == []


def test_diverged_run_names_the_term(kuea, align_arguments, tmp_path):
    answer = kuea(*align_arguments, "--set=optim.lr=1e30", "--set=runtime.log_every=1")
    assert answer.code == 1
    assert "step" in answer.err
    assert "out.diverged" in answer.err
    # Not a result, but what shows why.
    assert leftovers(tmp_path) == ["out.diverged"]
    assert leftovers(tmp_path / "out.diverged") == ["metrics.jsonl", "run.log", "run.yaml"]


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert condition(), process.communicate()


def started(arguments):
    # A session of its own, so that a signal can go to all processes as Ctrl-C and schedulers do.
    return subprocess.Popen(
        [sys.executable, "-m", "kuea_mllm", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_is_saved_and_resumed(kuea, align_arguments, tmp_path, stop):
    steps = 400
    arguments = [
        *align_arguments,
        f"--steps={steps}",
        "--set=data.workers=1",
        "--set=data.heldout_count=6",
        "--set=runtime.log_every=1",
    ]
    unfinished = tmp_path / "out.unfinished"
    metrics = unfinished / "metrics.jsonl"
    with started(arguments) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 4, process)
        os.killpg(process.pid, stop)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 128 + stop
    assert "Traceback" not in err
    line = next(line for line in err.splitlines() if "interrupted at step" in line)
    step = int(line.split("at step ")[1].split()[0])
    assert f"of {steps}; go on with: kuea-mllm align " in line
    assert line.endswith("--resume")
    assert leftovers(tmp_path) == ["out.unfinished"]
    assert leftovers(unfinished / "checkpoints") == [f"checkpoint-{step}"]

    # Neither begun anew nor gone on with by accident.
    refused = kuea(*arguments)
    assert refused.code == 2
    assert f"saved at step {step} of {steps}" in refused.err
    assert "--resume" in refused.err
    assert leftovers(tmp_path) == ["out.unfinished"]

    command = line.split("go on with: kuea-mllm ")[1]
    with started(shlex.split(command)) as process:
        wait_for(lambda: metrics.read_text().count("\n") > step + 4, process)
        os.killpg(process.pid, signal.SIGKILL)
    steps_logged = [row["step"] for row in rows_of(metrics) if "loss" in row]
    assert steps_logged[: step + 2] == list(range(1, step + 3))
    assert "resumed from" in (unfinished / "run.log").read_text()


def test_tensorboard_gets_the_rows(kuea, align_arguments, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    answer = kuea(*align_arguments, "--set=runtime.trackers=[tensorboard]")
    assert answer.code == 0, answer.err
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss_kernel")}
    rows = [row for row in rows_of(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert logged == {row["step"]: pytest.approx(row["loss_kernel"]) for row in rows}
    measured = events.Scalars("train/heldout_kernel_gap")
    assert [event.step for event in measured] == [0, 3]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_recomputed_activations_give_the_same_result(kuea, align_arguments, tmp_path):
    options = {"plain": [], "recomputed": ["--set=runtime.gradient_checkpointing=true"]}
    rows = []
    for name, more in options.items():
        answer = kuea(*align_arguments, f"--out={tmp_path / name}", *more)
        assert answer.code == 0, answer.err
        rows.append(rows_of(tmp_path / name / "metrics.jsonl")[-1]["heldout_kernel_gap"])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    log = (tmp_path / "recomputed" / "run.log").read_text()
    assert "gradient_checkpointing" in log
    assert "towers are not compiled (auto: it pays on CUDA, this is cpu)" in log


def test_write_failure_of_a_real_file_system(align_arguments, tmp_path):
    """A limit on file size makes real writes fail inside the libraries."""
    script = (
        "import resource, sys\n"
        "from kuea_mllm.cli.main import run\n"
        "import torch, transformers\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "run()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *align_arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"no space left on device while writing {tmp_path / 'out'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(tmp_path) == []


def test_checkpoint_with_missing_tensor_is_refused_by_name(kuea, align_arguments, tmp_path):
    shutil.copytree(ASSETS / "clip", tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    state = load_file(weights)
    del state["vision_model.post_layernorm.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    answer = kuea(*align_arguments, f"--student={tmp_path / 'clip'}")
    assert answer.code == 2
    assert "post_layernorm.weight" in answer.err
