"""`kuea-mllm calibrate`: what it prints and writes, and what it says about bad input."""

import json

import pytest
import typer
import yaml
from PIL import Image
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection
from typer.testing import CliRunner

from kuea_mllm.cli.calibrate import calibrate as command
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.towers.reading.load import load_tower


@pytest.fixture
def calibrate(pictures, monkeypatch):
    """Calibrate on the mini world; a later option wins over an earlier one."""
    monkeypatch.delenv("KUEA_MLLM_DEBUG", raising=False)
    app = typer.Typer()
    app.command()(command)
    arguments = [
        "--recipe=align/miniworld",
        f"--student={ASSETS / 'clip'}",
        f"--teacher={ASSETS / 'teacher'}",
        f"--images={pictures}",
        "--device=cpu",
        "--count=48",
    ]
    return lambda *more: CliRunner().invoke(app, [*arguments, *(str(item) for item in more)])


def test_calibrate_writes_what_it_prints(calibrate, tmp_path):
    out = tmp_path / "out"
    answer = calibrate("--json", f"--out={out}")
    assert answer.exit_code == 0, answer.stderr
    record = json.loads(answer.stdout)
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.json",
        "curve.png",
        "student_kernel.yaml",
    ]
    assert json.loads((out / "calibration.json").read_text()) == record
    with Image.open(out / "curve.png") as figure:
        assert figure.width > 600
    kernel = yaml.safe_load((out / "student_kernel.yaml").read_text())["objective"]
    assert kernel["student_kernel"]["gamma"] == pytest.approx(record["constants"]["gamma"], 1e-5)
    assert record["count"] == 48
    assert record["compared"][0] == 1.0  # the recipe's own gamma / coef0
    assert record["student"]["fingerprint"] == load_tower(ASSETS / "clip").fingerprint


def test_printed_options_set_the_kernel_of_the_recipe(calibrate):
    answer = calibrate()
    assert answer.exit_code == 0, answer.stderr
    (line,) = [line for line in answer.stdout.splitlines() if line.startswith("--set ")]
    overrides = line.split("--set ")[1:]
    recipe = load_recipe("align/miniworld", AlignRecipe, overrides=[o.strip() for o in overrides])
    kernel = recipe.objective.student_kernel
    shown = load_recipe("align/miniworld", AlignRecipe).objective.student_kernel
    assert kernel.gamma != shown.gamma
    assert f"{kernel.gamma:g}" in answer.stdout
    assert "rho by quarters" in answer.stdout
    # Nothing was asked to be written.
    assert "written" not in answer.stdout


def test_calibrate_repeats_itself_and_follows_its_seed(calibrate):
    first, again, other = (
        json.loads(calibrate("--json", *more).stdout) for more in ([], [], ["--seed=7"])
    )
    varying = ("created", "command")
    assert {k: v for k, v in first.items() if k not in varying} == {
        k: v for k, v in again.items() if k not in varying
    }
    assert other["value"] != first["value"]


def test_compat_and_readout_reach_the_teacher(calibrate):
    paper, released, patches = (
        json.loads(calibrate("--json", *more).stdout)
        for more in ([], ["--compat=released"], ["--readout=mean_patch"])
    )
    assert paper["teacher"]["normalisation"] == "own"
    assert released["teacher"]["normalisation"] == "student"
    assert patches["teacher"]["readout"] == "mean_patch"
    assert len({record["mean_teacher"] for record in (paper, released, patches)}) == 3


def test_kernel_and_degree_replace_those_of_the_recipe(calibrate):
    gaussian = json.loads(calibrate("--json", "--kernel=gaussian").stdout)
    assert (gaussian["parameter"], gaussian["degree"]) == ("sigma", None)
    assert gaussian["compared"] is None
    linear = json.loads(calibrate("--json", "--degree=1").stdout)
    assert linear["degree"] == 1
    cosine = json.loads(calibrate("--json", "--set=objective.teacher_kernel={type: cosine}").stdout)
    assert cosine["teacher_kernel"] == {"type": "cosine"}
    assert cosine["mean_teacher"] != linear["mean_teacher"]


SUM = "--set=objective.student_kernel={type: sum, kernels: [{kernel: {type: cosine}}]}"
BAD_OPTIONS = {
    "images that are not there": (["--images=no/such/folder"], "no/such/folder"),
    "student that is not there": (["--student=./nowhere"], "./nowhere"),
    "teacher that is not there": (["--teacher=./nowhere"], "./nowhere"),
    "kernel without one constant": ([SUM], "objective.student_kernel", "--kernel"),
    "unknown readout": (["--readout=middle"], "teacher.readout"),
    "unknown key": (["--set=objective.student_kernl=1"], "objective.student_kernl"),
    "device that is not there": (["--device=mps"], "mps"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option_ends_in_one_clear_line(calibrate, tmp_path, name):
    options, *expected = BAD_OPTIONS[name]
    answer = calibrate(*options, f"--out={tmp_path / 'out'}")
    assert answer.exit_code == 2
    assert answer.stderr.count("error: ") == 1
    assert "Traceback" not in answer.stderr
    for text in expected:
        assert text in answer.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--count=2"], ["--kernel=gaussian", "--degree=3"]])
def test_impossible_options_are_usage_errors(calibrate, options):
    assert calibrate(*options).exit_code == 2


def test_output_that_exists_is_refused_before_any_work(calibrate, tmp_path):
    answer = calibrate(f"--out={tmp_path}", "--student=./nowhere")
    assert answer.exit_code == 2
    assert "exists already" in answer.stderr


def test_two_images_are_too_few(calibrate, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (90 * number, 40, 20)).save(folder / f"{number}.png")
    answer = calibrate(f"--images={folder}")
    assert answer.exit_code == 2
    assert "2 images are too few" in answer.stderr


def test_images_that_are_all_equal_are_refused(calibrate, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32), (90, 40, 20)).save(folder / f"{number}.png")
    answer = calibrate(f"--images={folder}")
    assert answer.exit_code == 2
    assert "student embeddings of all 20 images are equal" in answer.stderr


def test_student_without_projection_is_refused(calibrate, tmp_path):
    CLIPVisionModel.from_pretrained(ASSETS / "clip").save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "preprocessor_config.json").write_bytes(
        (ASSETS / "clip" / "preprocessor_config.json").read_bytes()
    )
    answer = calibrate(f"--student={tmp_path / 'half'}")
    assert answer.exit_code == 2
    assert "visual_projection.weight" in answer.stderr


def test_student_with_broken_weights_is_named_with_the_image(calibrate, pictures, tmp_path):
    model = CLIPVisionModelWithProjection.from_pretrained(ASSETS / "clip")
    model.visual_projection.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "preprocessor_config.json").write_bytes(
        (ASSETS / "clip" / "preprocessor_config.json").read_bytes()
    )
    answer = calibrate(f"--student={tmp_path / 'broken'}")
    assert answer.exit_code == 2
    assert "the student embedding of image" in answer.stderr
    assert str(pictures) in answer.stderr
