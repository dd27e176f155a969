"""`kuea-mllm align`: what it writes, and what it says about bad input."""

import errno
import json
import os
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
    "image folder is a file": ([f"--images={__file__}"], "is not a folder"),
    "unknown recipe": (["--recipe=align/miniwrld"], "align/miniworld"),
    "unknown key": (["--set=optim.learning_rate=1"], "optim.learning_rate", "unknown key"),
    "wrong type": (["--set=optim.lr=fast"], "optim.lr", "'fast'"),
    "out of range": (["--set=optim.lr=-1"], "optim.lr", "greater than 0"),
    "warm-up longer than the run": (["--set=optim.warmup_steps=9"], "optim.warmup_steps (9)"),
    "nothing to learn": (["--set=objective.kernel_weight=0"], "objective.kernel_weight"),
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


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing_behind(align_arguments, tmp_path, stop):
    long_run = [*align_arguments, "--steps=100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "kuea_mllm", *long_run], stderr=subprocess.PIPE, text=True
    ) as process:
        partial = None
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            partial = next(tmp_path.glob(".out.partial-*/metrics.jsonl"), None)
            if partial is not None and partial.stat().st_size > 0:
                break
            time.sleep(0.1)
        assert partial is not None, process.communicate()
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert leftovers(tmp_path) == []


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
