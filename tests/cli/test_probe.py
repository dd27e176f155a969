"""`kuea-mllm probe`: from a tower and data sets to results, and what it refuses."""

import json
import shutil

import pytest
import torch
import yaml

from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.images import write_images
from kuea_mllm.miniworld.probe_sets import write_probe_sets
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower
from kuea_mllm.workflows import probe as workflow

CLIP = ASSETS / "clip"
DATASETS = ("single", "gray")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "data"
    write_probe_sets(folder, split="test", per_set=60, train=40)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A tower that was changed, and says what it was made from."""
    tower = load_tower(CLIP)
    start = {"base_tower": {"reference": str(CLIP), "fingerprint": tower.fingerprint}}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("other") / "tower"
    save_tower(tower, folder, manifest=start)
    return folder


def write_recipe(folder, **changes):
    content = {
        "kind": "probe",
        "suite": "zero-shot",
        "datasets": [
            {
                "name": name,
                "key": name,
                "source": "the mini world",
                "layout": "folder",
                "metric": "acc1",
                "documents": 60,
            }
            for name in DATASETS
        ],
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def arguments(tmp_path, data):
    recipe = write_recipe(tmp_path)
    return [
        "probe",
        CLIP,
        f"--recipe={recipe}",
        f"--data={data}",
        f"--out={tmp_path / 'out'}",
        "--device=cpu",
        "--workers=0",
    ]


def test_results_have_every_data_set_and_a_report(kuea, arguments, tmp_path):
    answer = kuea(*arguments, "--json")
    assert answer.code == 0, answer.err
    summary = json.loads(answer.out)
    out = tmp_path / "out"
    assert summary == json.loads((out / "summary.json").read_text())
    assert list(summary["columns"]) == [f"probe_zero_shot_{name}" for name in DATASETS]
    entry = summary["columns"]["probe_zero_shot_single"]
    rows = [json.loads(line) for line in (out / entry["samples"]).read_text().splitlines()]
    assert entry["n"] == len(rows) == 60
    assert entry["score"] == pytest.approx(sum(row["score"] for row in rows) / 60)
    assert 0.2 < entry["score"] < 1
    assert summary["settings"]["suite"] == "probe-zero-shot"
    assert "single" in (out / "report.html").read_text()
    assert yaml.safe_load((out / "recipes" / "zero_shot.yaml").read_text())["suite"] == "zero-shot"
    assert not (tmp_path / "out.unfinished").exists()


def test_average_of_the_recipe_is_printed(kuea, arguments, tmp_path):
    write_recipe(tmp_path, averages={"both": list(DATASETS), "one": ["gray"]})
    answer = kuea(*arguments)
    assert answer.code == 0, answer.err
    columns = json.loads((tmp_path / "out" / "summary.json").read_text())["columns"].values()
    scores = [100 * column["score"] for column in columns]
    assert f"both, mean of 2: {sum(scores) / 2:.2f}\n" in answer.out
    assert f"one, mean of 1: {scores[1]:.2f}\n" in answer.out
    partial = kuea(*arguments, "--datasets=gray", f"--out={tmp_path / 'partial'}")
    assert "one, mean of 1" in partial.out
    assert "both" not in partial.out


def test_against_compares_picture_by_picture(kuea, arguments, tmp_path, other):
    arguments[1] = other
    answer = kuea(*arguments, f"--against={CLIP}", "--json")
    assert answer.code == 0, answer.err
    comparison = json.loads(answer.out)
    out = tmp_path / "out"
    column = comparison["columns"]["probe_zero_shot_single"]
    scores = [
        json.loads((out / half / "summary.json").read_text())["columns"]["probe_zero_shot_single"]
        for half in ("baseline", "candidate")
    ]
    assert column["paired"]
    assert column["low"] <= column["difference"] <= column["high"]
    assert column["difference"] == pytest.approx(scores[1]["score"] - scores[0]["score"])
    assert column["answers_changed"] > 0
    assert (out / "report.html").is_file()
    again = kuea("compare", out / "baseline", out / "candidate", "--json")
    assert json.loads(again.out)["columns"]["probe_zero_shot_single"] == column


def test_finished_half_is_kept(kuea, arguments, tmp_path, other, monkeypatch):
    arguments[1] = other
    run_job, calls = workflow.run_job, []

    def stop_in_second_half(job, subject, place):
        calls.append(job.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_job(job, subject, place)

    monkeypatch.setattr(workflow, "run_job", stop_in_second_half)
    assert kuea(*arguments, f"--against={CLIP}").code == 130
    refused = kuea(*arguments, f"--against={CLIP}")
    assert refused.code == 2
    assert "--resume" in refused.err
    changed = kuea(*arguments, f"--against={CLIP}", "--resume", "--limit=20")
    assert changed.code == 2
    assert "'limit'" in changed.err
    swapped = kuea(*arguments, f"--against={other}", "--resume")
    assert swapped.code == 2
    assert "is not the tower of the finished baseline" in swapped.err
    for option, named in ((f"--base={CLIP}", "base is"), ("--datasets=single", "datasets is")):
        other_text = kuea(*arguments, f"--against={CLIP}", "--resume", option)
        assert other_text.code == 2
        assert named in " ".join(other_text.err.split())
    del calls[:]
    answer = kuea(*arguments, f"--against={CLIP}", "--resume")
    assert answer.code == 0, answer.err
    assert calls == ["zero_shot_single", "zero_shot_gray"]
    assert (tmp_path / "out" / "comparison.json").is_file()


def test_resumed_run_does_not_repeat_a_data_set(kuea, arguments, tmp_path, monkeypatch):
    run_job, calls = workflow.run_job, []

    def stop_at_the_second(job, subject, place):
        calls.append(job.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_job(job, subject, place)

    monkeypatch.setattr(workflow, "run_job", stop_at_the_second)
    assert kuea(*arguments).code == 130
    assert (tmp_path / "out.unfinished").is_dir()
    other_limit = kuea(*arguments, "--resume", "--limit=20")
    assert other_limit.code == 2
    assert "limit" in other_limit.err
    del calls[:]
    monkeypatch.setattr(workflow, "run_job", run_job)
    answer = kuea(*arguments, "--resume", "--json")
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)["columns"]) == 2


def test_resumed_run_is_of_the_same_activation(kuea, arguments, tmp_path, monkeypatch):
    """A fingerprint of weights does not tell two activations apart."""
    arguments[1] = copy = shutil.copytree(CLIP, tmp_path / "clip")
    run_job, calls = workflow.run_job, []

    def stop_at_the_second(job, subject, place):
        calls.append(job.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_job(job, subject, place)

    monkeypatch.setattr(workflow, "run_job", stop_at_the_second)
    assert kuea(*arguments).code == 130
    config = json.loads((copy / "config.json").read_text())
    part = config.get("vision_config", config)
    part["hidden_act"] = "gelu" if part["hidden_act"] != "gelu" else "quick_gelu"
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(workflow, "run_job", run_job)
    answer = kuea(*arguments, "--resume")
    assert answer.code == 2
    assert "the model is not that of the unfinished evaluation" in " ".join(answer.err.split())


WRONG_DATA = {
    "class without an image": "1 of 10 classes have no image: 'nine'",
    "caption file that names a missing image": "names image 00000.png, which is not in",
    "damaged picture": "00000.png cannot be read",
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data_set_ends_in_one_clear_line(kuea, arguments, tmp_path, data, name):
    copy = shutil.copytree(data, tmp_path / "data")
    arguments[3] = f"--data={copy}"
    [first] = (copy / "single" / "test").rglob("00000.png")
    if name == "damaged picture":
        first.write_bytes(first.read_bytes()[:60])
    elif name == "class without an image":
        (copy / "single" / "classnames.txt").write_text("\n".join(DIGITS))
        shutil.rmtree(copy / "single" / "test" / "nine")
    else:
        (copy / "captioned" / "images" / "00000.png").unlink()
        entry = {"name": "pictures", "key": "captioned", "layout": "karpathy", "documents": 60}
        entry |= {"source": "the mini world", "metric": "recall@k"}
        write_recipe(tmp_path, suite="retrieval", datasets=[entry])
    answer = kuea(*arguments)
    assert answer.code == (1 if name == "damaged picture" else 2)
    assert WRONG_DATA[name] in " ".join(answer.err.split())
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(kuea, arguments, tmp_path):
    answer = kuea(*arguments, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert [entry["name"] for entry in json.loads(answer.out)["datasets"]] == list(DATASETS)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_dry_run_finds_what_is_wrong_with_the_last_data_set(kuea, arguments, tmp_path, data):
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / DATASETS[-1] / "classnames.txt").write_text("\n".join([*DIGITS, "ten"]))
    arguments[3] = f"--data={copy}"
    answer = kuea(*arguments, "--dry-run")
    assert answer.code == 2
    assert "1 of 11 classes have no image: 'ten'" in " ".join(answer.err.split())
    assert not (tmp_path / "cache").exists()


def test_keys_of_a_section_go_to_the_suite_of_that_name(kuea, tmp_path, data):
    copy, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    (copy / "linear_digit").rename(copy / "vtab-svhn")
    for part in [part for kind in (copy / "coco").iterdir() for part in kind.iterdir()]:
        part.rename(part.with_name(f"{part.name}2017"))
    given = ["probe", CLIP, f"--data={copy}", f"--out={out}", "--device=cpu", "--workers=0"]
    keys = ["--set=linear.epochs=2", "--set=patch.epochs=1", "--datasets=svhn,MSCOCO"]
    answer = kuea(*given, "--suite=linear,patch", *keys)
    assert answer.code == 0, answer.err
    for suite, epochs in (("linear", 2), ("patch", 1)):
        recipe = yaml.safe_load((out / "recipes" / f"{suite}.yaml").read_text())
        assert recipe[suite]["epochs"] == epochs
    refused = kuea(*given, "--suite=linear", *keys)
    assert refused.code == 2
    assert "suite linear takes no section 'patch'" in " ".join(refused.err.split())


def test_all_missing_data_sets_are_named_at_once(kuea, tmp_path, data):
    answer = kuea("probe", CLIP, "--suite=all", f"--data={data}", f"--out={tmp_path / 'out'}")
    assert answer.code == 2
    for name in ("CIFAR10", "MSCOCO", "svhn", "MMVP-VLM"):
        assert name in answer.err
    assert not (tmp_path / "out").exists()


def test_tower_without_text_partner_is_refused_before_anything_is_embedded(
    kuea, arguments, tmp_path, other
):
    alone = shutil.copytree(other, tmp_path / "alone")
    record = json.loads((alone / "kuea.json").read_text())
    del record["base_tower"]
    (alone / "kuea.json").write_text(json.dumps(record))
    arguments[1] = alone
    answer = kuea(*arguments)
    assert answer.code == 2
    assert "--base" in answer.err
    assert not (tmp_path / "cache").exists()
    assert kuea(*arguments, f"--base={CLIP}").code == 0


BAD = {
    "unknown suite": (["--suite=zero"], "no suite is called 'zero'"),
    "suite of another recipe": (["--suite=linear"], "is of suite zero-shot"),
    "unknown data set": (["--datasets=CIFAR"], "'CIFAR'"),
    "unknown key": (["--set=batchsize=3"], "batch_size"),
    "missing tower": (["--against=no/such/tower"], "no/such/tower"),
    "device that is not there": (["--device=mps"], "mps"),
    "data is no folder": (["--data=no/such/folder"], "no/such/folder"),
    "unknown compat": (["--compat=wrong"], "compat"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_ends_in_one_clear_line(kuea, arguments, tmp_path, name):
    options, expected = BAD[name]
    given = [a for a in arguments if not (name == "unknown suite" and "--recipe" in str(a))]
    answer = kuea(*given, *options, "--dry-run")
    assert answer.code == 2
    assert expected in " ".join(answer.err.split())
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_projection_has_no_patches_and_none_of_the_released_faults(kuea, arguments, tmp_path):
    images = tmp_path / "images"
    write_images(images, split="train", count=48, seed=0)
    made = kuea(
        "align",
        "--recipe=align/miniworld",
        "--set=method=projection",
        "--batch-size=16",
        f"--student={CLIP}",
        f"--teacher={ASSETS / 'teacher'}",
        f"--images={images}",
        "--set=data.heldout_count=16",
        "--device=cpu",
        f"--out={tmp_path / 'projection'}",
    )
    assert made.code == 0, made.err
    arguments[1] = tmp_path / "projection"
    answer = kuea(*arguments, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["model"]["adapter"] == "projection"
    cells = {
        "name": "cells",
        "key": "coco",
        "source": "the mini world",
        "layout": "coco-stuff",
        "split": "val",
        "train_split": "train",
        "metric": "macro_recall",
        "documents": 60,
    }
    write_recipe(tmp_path, suite="patch", patch={}, datasets=[cells])
    refused = kuea(*arguments, f"--out={tmp_path / 'second'}")
    assert refused.code == 2
    assert "no patch tokens" in " ".join(refused.err.split())
    tiny = {**cells, "key": "gray", "layout": "folder", "split": "test", "faults": ["raw_pixels"]}
    write_recipe(tmp_path, datasets=[{**tiny, "metric": "acc1"}])
    refused = kuea(*arguments, f"--out={tmp_path / 'second'}", "--compat=released")
    assert refused.code == 2
    assert "--compat released" in " ".join(refused.err.split())


def test_nothing_to_probe_is_refused(kuea, tmp_path):
    answer = kuea("probe", CLIP, f"--out={tmp_path / 'out'}")
    assert answer.code == 2
    assert "--suite" in answer.err


def test_existing_output_is_refused(kuea, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    answer = kuea(*arguments)
    assert answer.code == 2
    assert "exists already" in answer.err
