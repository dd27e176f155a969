"""`kuea-mllm lora`: what it writes, how it ends early, and what it says about bad input."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "invariance"))
from tuning_world import make_world, weights_of, write_tiny_llava

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.tuning.examples import TuningExamples
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.run import run_tuning

RECIPE = """
kind: lora
data: {workers: 0, max_length: 420}
lora: {rank: 4, alpha: 8, dropout: 0.0}
optim: {lr: 2.0e-3, projector_lr: 1.0e-3, batch_size: 4, epochs: null, steps: 6}
runtime: {device: cpu, dtype: float32, seed: 3, log_every: 1}
"""
IN_EVERY_UPDATE = "--set=checkpoint.every_steps=1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lora")
    make_world(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def arguments(world, tmp_path):
    """A run of six updates of four samples; a later option wins over an earlier one."""
    return [
        "lora",
        f"--recipe={world / 'recipe.yaml'}",
        f"--model={world / 'model'}",
        f"--data={world / 'mixture.json'}",
        f"--images={world / 'images'}",
        f"--out={tmp_path / 'out'}",
    ]


@pytest.fixture(scope="module")
def whole(world):
    """What `arguments` train."""
    recipe = load_recipe(
        str(world / "recipe.yaml"),
        LoraRecipe,
        settings={
            "model.path": str(world / "model"),
            "data.file": str(world / "mixture.json"),
            "data.images": str(world / "images"),
        },
    )
    run_tuning(recipe, world / "whole", progress=False)
    return weights_of(world / "whole")


@pytest.fixture
def images(world, tmp_path):
    """A copy of the pictures, to be damaged."""
    folder = tmp_path / "images"
    shutil.copytree(world / "images", folder)
    return folder


def damaged_mixture(world, tmp_path, change):
    records = json.loads((world / "mixture.json").read_text())
    change(records)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(records))
    return path


def runs_in(folder):
    return sorted(path.name for path in folder.glob("out*"))


def checkpoints_in(folder):
    return sorted(path.name for path in (folder / "out.unfinished" / "checkpoints").iterdir())


def start(arguments):
    # A session of its own, so that a signal reaches all processes, as schedulers send it.
    return subprocess.Popen(
        [sys.executable, "-m", "kuea_mllm", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert condition(), process.communicate()


def test_terminated_run_is_resumed_and_equals_an_uninterrupted_one(
    kuea, arguments, world, tmp_path
):
    run = [*arguments, "--set=lora.dropout=0.1", "--workers=1", "--micro-batch-size=4"]
    run.append("--steps=40")
    metrics = tmp_path / "out.unfinished" / "metrics.jsonl"
    process = start(run)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 143
    assert "Traceback" not in err
    # What libraries recommend at import is kept from those who did not ask.
    assert "kernels-community" not in err
    line = next(line for line in err.splitlines() if "interrupted at step" in line)
    step = int(line.split("at step ")[1].split()[0])
    assert "of 40; go on with: kuea-mllm lora " in line
    assert checkpoints_in(tmp_path) == [f"checkpoint-{step}"]

    resumed = kuea(*shlex.split(line.split("go on with: kuea-mllm ")[1]))
    assert resumed.code == 0, resumed.err
    assert runs_in(tmp_path) == ["out"]
    whole = kuea(*run, f"--out={tmp_path / 'out_whole'}")
    assert whole.code == 0, whole.err
    found, wanted = weights_of(tmp_path / "out"), weights_of(tmp_path / "out_whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    logs = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("out", "out_whole")]
    losses = [[json.loads(row)["loss"] for row in log.splitlines()] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 40


def test_image_missing_from_the_start_is_told_before_anything_is_loaded(
    kuea, arguments, images, tmp_path
):
    (images / "2.png").unlink()
    answer = kuea(*arguments, f"--images={images}")
    assert answer.code == 2
    assert "1 of the first 29 images are missing" in answer.err
    assert "first 2.png" in answer.err
    assert "kuea-mllm doctor --data" in answer.err
    assert "trained" not in answer.err
    assert runs_in(tmp_path) == []


@pytest.mark.parametrize("fault", ["cut short", "missing"])
def test_bad_image_in_the_middle_names_record_and_file_and_the_run_goes_on(
    kuea, arguments, whole, images, tmp_path, monkeypatch, fault
):
    # As if the mixture were long: only the first images are looked at beforehand.
    monkeypatch.setattr("kuea_mllm.tuning.inputs._FIRST_IMAGES", 4)
    content = (images / "21.png").read_bytes()
    (images / "21.png").write_bytes(content[:60])
    if fault == "missing":
        (images / "21.png").unlink()
    workers = "--workers=1" if fault == "missing" else "--workers=0"
    run = [*arguments, f"--images={images}", IN_EVERY_UPDATE, workers]
    answer = kuea(*run)
    assert answer.code == 1
    last = answer.err[answer.err.index("error: ") :]
    assert "record 21 (id 'r21')" in last
    assert f"image {images / '21.png'} cannot be read" in last
    assert "Traceback" not in answer.err
    assert "the unfinished run is kept; --resume goes on" in " ".join(answer.err.split())
    assert checkpoints_in(tmp_path) == ["checkpoint-2", "checkpoint-3"]

    (images / "21.png").write_bytes(content)
    assert kuea(*run, "--resume").code == 0
    found = weights_of(tmp_path / "out")
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def _without_tag(records):
    records[2]["conversations"][0]["value"] = "red"


def _with_two_tags(records):
    records[2]["conversations"][2]["value"] += "<image>"


def _with_two_questions(records):
    records[2]["conversations"].insert(1, {"from": "human", "value": "and this"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_tag, "0 of its 6 turns have an <image> tag, and it has one image"),
        (_with_two_tags, "2 of its 6 turns have an <image> tag, and it has one image"),
        (_with_two_questions, "turn 2 is from human, as is the one before"),
    ],
)
def test_malformed_conversation_is_named_with_its_fault(
    kuea, arguments, world, tmp_path, change, words
):
    data = damaged_mixture(world, tmp_path, change)
    answer = kuea(*arguments, f"--data={data}")
    assert answer.code == 2
    assert f"data file {data}, record 2 (id 'r2'): {words}" in answer.err
    assert "--write-clean" in answer.err
    assert runs_in(tmp_path) == []


def test_record_with_an_empty_answer_is_named_and_counted(kuea, arguments, world, tmp_path):
    def change(records):
        records[21]["conversations"][1]["value"] = ""

    data = damaged_mixture(world, tmp_path, change)
    answer = kuea(*arguments, f"--data={data}")
    assert answer.code == 0, answer.err
    told = " ".join(answer.err.split())
    assert "record 21 (id 'r21'): nothing is learned from it" in told
    record = json.loads((tmp_path / "out" / "adapter" / "kuea.json").read_text())
    assert record["data"]["unlabelled_samples"] == 1


def test_tokenizer_without_a_token_to_pad_with_is_refused(kuea, arguments, world, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"pad_token": None, "unk_token": None}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    answer = kuea(*arguments, f"--model={model}")
    assert answer.code == 2
    assert f"the tokenizer in {model} has neither a padding token nor" in answer.err
    assert '"pad_token" in tokenizer_config.json' in answer.err
    assert runs_in(tmp_path) == []


def test_weights_are_not_merged_into_another_base(kuea, arguments, tmp_path):
    assert kuea(*arguments, "--steps=1").code == 0
    other = tmp_path / "other"
    write_tiny_llava(other, seed=5)
    answer = kuea("merge", tmp_path / "out", tmp_path / "out_merged", f"--base={other}")
    assert answer.code == 2
    assert str(other) in answer.err
    assert "these LoRA weights were trained on another base" in answer.err
    assert runs_in(tmp_path) == ["out"]


def test_loss_that_is_not_a_number_names_the_record_and_keeps_the_good_checkpoint(
    kuea, arguments, tmp_path, monkeypatch
):
    forward, calls = TuningModel.forward, []

    def spoiled(self, **batch):
        calls.append(None)
        return forward(self, **batch) * (float("nan") if len(calls) == 11 else 1.0)

    monkeypatch.setattr(TuningModel, "forward", spoiled)
    answer = kuea(*arguments, IN_EVERY_UPDATE)
    assert answer.code == 1
    # The progress bar was closed before.
    error = answer.err[answer.err.index("\nerror: ") :]
    assert "loss is nan at step 3" in error
    assert "record 10 (id 'r10')" in error
    good = tmp_path / "out.unfinished" / "checkpoints" / "checkpoint-2"
    assert f"The last good checkpoint is {good}." in error
    assert checkpoints_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_record_that_spoils_the_loss_is_met_again_and_may_be_skipped(
    kuea, arguments, tmp_path, monkeypatch
):
    pixels = TuningExamples._pixels

    def spoiled(self, image, index):
        return pixels(self, image, index) * (float("nan") if index == 10 else 1.0)

    monkeypatch.setattr(TuningExamples, "_pixels", spoiled)
    run = [*arguments, IN_EVERY_UPDATE]
    for again in ([], ["--resume"]):
        answer = kuea(*run, *again)
        assert answer.code == 1
        told = " ".join(answer.err[answer.err.index("\nerror: ") :].split())
        assert "record 10 (id 'r10')" in told
        assert "--set 'data.skip_records=[NUMBER]', with --resume from a checkpoint" in told
        assert checkpoints_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]

    skipping = "--set=data.skip_records=[10]"
    answer = kuea(*run, "--resume", skipping)
    assert answer.code == 0, answer.err
    told = " ".join(answer.err.split())
    assert "data.skip_records is [10] now, was []" in told
    assert "nothing is learned from" in told
    record = json.loads((tmp_path / "out" / "adapter" / "kuea.json").read_text())
    assert record["data"]["skipped_records"] == [10]
    assert (record["data"]["samples"], record["data"]["unlabelled_samples"]) == (23, 0)
    # As if it had been skipped from the start: no sample changed its place.
    whole = kuea(*run, skipping, f"--out={tmp_path / 'out_whole'}")
    assert whole.code == 0, whole.err
    found, wanted = weights_of(tmp_path / "out"), weights_of(tmp_path / "out_whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_record_to_skip_that_is_not_there_is_refused(kuea, arguments, tmp_path):
    answer = kuea(*arguments, "--set=data.skip_records=[3,38]")
    assert answer.code == 2
    assert "key 'data.skip_records' names record 38" in answer.err
    assert "is 37" in " ".join(answer.err.split())
    assert runs_in(tmp_path) == []


def test_shortage_of_memory_is_one_line_that_says_what_to_change(
    kuea, arguments, tmp_path, monkeypatch
):
    forward, calls = TuningModel.forward, []

    def hungry(self, **batch):
        calls.append(None)
        if len(calls) == 11:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0")
        return forward(self, **batch)

    monkeypatch.setattr(TuningModel, "forward", hungry)
    answer = kuea(*arguments, IN_EVERY_UPDATE, "--set=runtime.gradient_checkpointing=false")
    assert answer.code == 1
    told = answer.err[answer.err.index("\nerror: ") :].splitlines()[1:]
    assert len(told) == 2
    assert told[0].startswith("error: out of memory on cpu while tuning ")
    assert told[0].endswith(" (2.50 GiB more were asked for).")
    assert "Go on by --resume with --set runtime.gradient_checkpointing=true." in told[1]
    assert checkpoints_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    again = "--set=runtime.gradient_checkpointing=true"
    assert kuea(*arguments, IN_EVERY_UPDATE, again, "--resume").code == 0


def test_liger_is_refused_before_a_model_is_loaded(kuea, arguments, tmp_path):
    answer = kuea(*arguments, "--set=runtime.liger=true")
    assert answer.code == 2
    assert "Liger kernels run on CUDA only" in answer.err
    assert "trained" not in answer.err
    assert runs_in(tmp_path) == []
