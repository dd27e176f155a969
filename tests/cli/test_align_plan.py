"""`kuea-mllm align --dry-run` where models or images are not here, and the options of align."""

import json

import pytest
import yaml

from kuea_mllm.errors import UserError
from kuea_mllm.miniworld import ASSETS


@pytest.fixture
def away(monkeypatch, tmp_path):
    """No model of the hub is on this machine."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


def test_shipped_recipe_is_planned_without_weights_and_images(kuea, away, tmp_path):
    answer = kuea("align", f"--out={tmp_path / 'out'}", "--dry-run", "--micro-batch-size=8")
    assert answer.code == 0, answer.err
    recipe = yaml.safe_load(answer.out)
    assert recipe["objective"]["student_kernel"]["trainable"] is True
    assert recipe["runtime"]["micro_batch_size"] == 8
    assert "not set: data.images (--images)" in answer.out
    assert f"not on this machine: {recipe['student']['model']}" in answer.out
    assert "in pieces of 8" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_plan_is_for_the_asked_number_of_processes(kuea, away, tmp_path):
    answer = kuea("align", f"--out={tmp_path / 'out'}", "--dry-run", "--num-processes=4", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["images"] is None
    assert found["plan"]["processes"] == 4
    assert found["plan"]["images_per_device"] * 4 == found["recipe"]["optim"]["batch_size"]
    assert found["missing"] == ["data.images (--images)"]


def test_dry_run_names_all_that_is_missing(kuea, tmp_path):
    answer = kuea("align", "--recipe=align/miniworld", f"--out={tmp_path / 'out'}", "--dry-run")
    assert answer.code == 0, answer.err
    for flag in ("--student", "--teacher", "--images"):
        assert flag in answer.out


def test_dry_run_opens_what_is_here(kuea, align_arguments):
    answer = kuea(*align_arguments, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["images"] == 58
    assert found["recipe"]["runtime"]["device"] == "cpu"
    assert "missing" not in found


def test_dry_run_refuses_a_path_that_does_not_exist(kuea, align_arguments):
    answer = kuea(*align_arguments, "--dry-run", "--student=./nowhere")
    assert answer.code == 2
    assert "./nowhere" in answer.err


OPTIONS = {
    "--precision=bf16": ("runtime", "precision", "bf16"),
    "--micro-batch-size=4": ("runtime", "micro_batch_size", 4),
    "--cache": ("targets", "cache", True),
    "--no-cache": ("targets", "cache", False),
    "--workers=3": ("data", "workers", 3),
    "--teacher-readout=mean_patch": ("teacher", "readout", "mean_patch"),
    "--compat=released": ("objective", "student_kernel", "trainable", False),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_reaches_the_recipe(kuea, align_arguments, option):
    answer = kuea(*align_arguments, option, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    *keys, expected = OPTIONS[option]
    value = json.loads(answer.out)["recipe"]
    for key in keys:
        value = value[key]
    assert value == expected


def test_resume_and_restart_contradict_each_other(kuea, align_arguments):
    answer = kuea(*align_arguments, "--resume", "--restart")
    assert answer.code == 2
    assert "contradict" in answer.err


class Device:
    total_memory = 1 << 20


def test_run_that_does_not_fit_the_device_is_refused_before_loading(monkeypatch):
    from kuea_mllm.cli.align_plan import check_device_memory
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe

    settings = {"student.model": str(ASSETS / "clip"), "teacher.model": str(ASSETS / "teacher")}
    recipe = load_recipe(
        "align/miniworld", AlignRecipe, settings={**settings, "runtime.device": "cuda"}
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Device)
    with pytest.raises(UserError, match="GiB per device"):
        check_device_memory(recipe, processes=1)
