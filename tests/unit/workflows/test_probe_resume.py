"""A probe that goes on is of the same things as the one that stopped, whatever their names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kuea_mllm.config.probe import ProbeRecipe
from kuea_mllm.errors import DataError, UserError
from kuea_mllm.io import read_json, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.probe_sets import write_probe_sets
from kuea_mllm.workflows import probe as workflow
from kuea_mllm.workflows.probe import Probing, probe, probe_pair
from kuea_mllm.workflows.probe_suites import ProbePlace, plan_jobs

CLIP = ASSETS / "clip"


def entry(key: str, **changes: Any) -> dict[str, Any]:
    common = {"name": key, "key": key, "source": "the mini world", "documents": 24}
    return {**common, "layout": "folder", "metric": "acc1", **changes}


SINGLE, GRAY = entry("single"), entry("gray")
CAPTIONED = entry("captioned", layout="karpathy", metric="recall@k")
PAIRS = entry("pairs", layout="mmvp-vlm", metric="pair_accuracy")
COUNT = entry("linear_count", train_split="train", metric="lp_acc1", train_documents=40)
CELLS = entry(
    "coco",
    layout="coco-stuff",
    split="val",
    train_split="train",
    metric="macro_recall",
    train_documents=40,
)
PATCH = {"epochs": 3, "batch_size": 8, "warmup_steps": 2, "head": "linear"}


def recipe(suite: str, *datasets: dict[str, Any], **changes: Any) -> ProbeRecipe:
    content = {"kind": "probe", "suite": suite, "datasets": list(datasets), **changes}
    return ProbeRecipe.parse(content, origin="a test")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe") / "data"
    write_probe_sets(folder, split="test", per_set=24, train=40)
    classes = sorted(path.name for path in (folder / "single" / "test").iterdir())
    lines = "\n".join(f"{name}\t{name}" for name in classes)
    (folder / "single" / "classnames.txt").write_text(lines)
    return folder


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def probing(data: Path, *recipes: ProbeRecipe, **changes: Any) -> Probing:
    place = ProbePlace(data, workers=0, cache=data.parent / "cache")
    return Probing(plan_jobs(recipes), place, thumbnails=0, **changes)


def stop_after(monkeypatch: pytest.MonkeyPatch, finished: int) -> None:
    run_job, calls = workflow.run_job, []

    def run(job: Any, subject: Any, place: Any) -> Any:
        calls.append(job.name)
        if len(calls) > finished:
            monkeypatch.setattr(workflow, "run_job", run_job)
            raise KeyboardInterrupt
        return run_job(job, subject, place)

    monkeypatch.setattr(workflow, "run_job", run)


def stopped(
    tower: Path, how: Probing, out: Path, monkeypatch: pytest.MonkeyPatch, finished: int = 1
) -> None:
    stop_after(monkeypatch, finished)
    with pytest.raises(KeyboardInterrupt):
        probe(str(tower), how, out)


def swap_files(folder: Path, pattern: str) -> None:
    """Give every file the content of another one, but its own size, which a listing knows."""
    files = sorted(folder.rglob(pattern), key=lambda path: path.stat().st_size)
    contents = [path.read_bytes() for path in files]
    for path, content, before in zip(files[1:], contents, contents[1:], strict=False):
        path.write_bytes(content + bytes(len(before) - len(content)))


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    content = read_json(path)
    change(content)
    write_json(path, content)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


CHANGES: dict[str, tuple[ProbeRecipe, Callable[[Path], None], str]] = {
    "pictures of equal names and sizes": (
        recipe("zero-shot", SINGLE, GRAY),
        lambda data: swap_files(data / "single" / "test", "*.png"),
        "images of split test",
    ),
    "class names": (
        recipe("zero-shot", SINGLE, GRAY),
        lambda data: rewrite(data / "single" / "classnames.txt", "\t", "\ta "),
        "class names of split test",
    ),
    "prompts": (
        recipe("zero-shot", SINGLE, GRAY),
        lambda data: rewrite(
            data / "single" / "zeroshot_classification_templates.txt", "{c}", "{c}!"
        ),
        "prompts of split test",
    ),
    "captions": (
        recipe("retrieval", CAPTIONED),
        lambda data: change_json(
            data / "captioned" / "dataset.json",
            lambda content: content["images"][0]["sentences"][0].update(raw="another"),
        ),
        "captions of split test",
    ),
    "training pictures of a linear probe": (
        recipe("linear", COUNT, linear={"epochs": 1}),
        lambda data: swap_files(data / "linear_count" / "train", "*.png"),
        "images of split train",
    ),
    "label maps": (
        recipe("patch", CELLS, patch={**PATCH, "epochs": 1}),
        lambda data: swap_files(data / "coco" / "annotations", "*.png"),
        "pictures or label maps of split train",
    ),
    "statements of pairs": (
        recipe("mmvp-vlm", PAIRS),
        lambda data: rewrite(data / "pairs" / "Questions.csv", " a ", " no "),
        "statements",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_data_that_were_replaced_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    suite, change, named = CHANGES[name]
    more = [] if suite.suite == "zero-shot" else [recipe("zero-shot", GRAY)]
    how = probing(data, suite, *more)
    stopped(CLIP, how, tmp_path / "out", monkeypatch)
    change(data)
    first = suite.datasets[0].name
    with pytest.raises(UserError, match=f"--resume: the {named} changed since data set {first}"):
        probe(str(CLIP), how, tmp_path / "out", resume=True)


@pytest.mark.parametrize("pair", [False, True])
def test_hole_in_the_last_data_set_shows_before_the_first_is_scored(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: bool
) -> None:
    how = probing(data, recipe("zero-shot", SINGLE), recipe("mmvp-vlm", PAIRS))
    scored: list[str] = []
    monkeypatch.setattr(workflow, "run_job", lambda job, *_: scored.append(job.name))
    next((data / "pairs").rglob("*.png")).unlink()
    with pytest.raises(DataError, match="which is not there"):
        if pair:
            probe_pair(str(CLIP), str(CLIP), how, tmp_path / "out")
        else:
            probe(str(CLIP), how, tmp_path / "out")
    assert scored == []


def test_size_is_recorded_and_warned_of_once(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)  # off once a command has run
    large = entry("single", documents=10_000)
    count = {**COUNT, "documents": 40, "train_documents": 50}
    pairs = {**PAIRS, "documents": 135}
    how = probing(
        data,
        recipe("zero-shot", large, GRAY, limit=5),
        recipe("linear", count, linear={"epochs": 1}),
        recipe("mmvp-vlm", pairs, limit=5),
    )
    columns = probe(str(CLIP), how, tmp_path / "out")["columns"].values()
    found = {
        column["dataset"]: [
            *(column["documents_found"], column["documents"]),
            *(column["train_documents_found"], column["train_documents"]),
        ]
        for column in columns
    }
    pairs_here = len((data / "pairs" / "Questions.csv").read_text().splitlines()) // 2
    linear_here = len(list((data / "linear_count" / "test").rglob("*.png")))
    assert pairs_here > 5
    assert found == {
        # Before the limit: what lies here is not the published set.
        "single": [24, 10_000, None, None],
        "gray": [24, 24, None, None],
        "linear_count": [linear_here, 40, 40, 50],
        "pairs": [pairs_here, 135, None, None],
    }
    assert caplog.text.count("data set single has 24 images in split test") == 1
    assert caplog.text.count("data set linear_count has 40 images in split train") == 1


def test_same_data_are_taken_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = probing(data, recipe("zero-shot", SINGLE, GRAY))
    stopped(CLIP, how, tmp_path / "out", monkeypatch)
    summary = probe(str(CLIP), how, tmp_path / "out", resume=True)
    assert list(summary["inputs"]) == ["zero_shot_single", "zero_shot_gray"]
    assert "text tower" in summary["inputs"]["zero_shot_gray"]


def scale(path: Path, chosen: Callable[[str], bool]) -> None:
    state = load_file(path)
    names = [name for name in state if chosen(name)]
    assert names
    for name in names:
        state[name] = 1.5 * state[name]
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "named"),
    [("visual_projection", "tower or its preprocessing"), ("text_model", "text tower")],
)
def test_other_weights_under_the_same_path_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, named: str
) -> None:
    """Neither is a part of the tower's own fingerprint."""
    clip = Path(shutil.copytree(CLIP, tmp_path / "clip"))
    tower, base = (clip, None) if part == "visual_projection" else (CLIP, str(clip))
    how = probing(data, recipe("zero-shot", SINGLE, GRAY), base=base)
    stopped(tower, how, tmp_path / "out", monkeypatch)
    scale(clip / "model.safetensors", lambda name: part in name)
    with pytest.raises(UserError, match=f"--resume: the {named} changed since data set single"):
        probe(str(tower), how, tmp_path / "out", resume=True)


def test_finished_half_of_other_data_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = probing(data, recipe("zero-shot", SINGLE))
    stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        probe_pair(str(CLIP), str(CLIP), how, tmp_path / "out")
    swap_files(data / "single" / "test", "*.png")
    with pytest.raises(UserError, match="--resume: the images of split test changed"):
        probe_pair(str(CLIP), str(CLIP), how, tmp_path / "out", resume=True)


def test_patch_probe_goes_on_inside_of_its_data_set(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = probing(data, recipe("patch", CELLS, patch=PATCH))
    whole = probe(str(CLIP), how, tmp_path / "whole")
    from kuea_mllm.probing.patch_checkpoint import PatchCheckpoint

    write, epochs = PatchCheckpoint.write, []

    def stop_in_the_third(self: Any, heads: Any, optimizer: Any, schedule: Any, found: Any) -> None:
        epochs.append(len(found))
        if len(epochs) == 3:
            raise KeyboardInterrupt
        write(self, heads, optimizer, schedule, found)

    monkeypatch.setattr(PatchCheckpoint, "write", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        probe(str(CLIP), how, tmp_path / "out")
    assert list((tmp_path / "out.unfinished" / "work").rglob("*.safetensors"))
    summary = probe(str(CLIP), how, tmp_path / "out", resume=True)
    assert epochs == [1, 2, 3, 3]
    assert not (tmp_path / "out.unfinished").exists()
    for task, column in whole["columns"].items():
        assert summary["columns"][task]["details"]["metrics"] == column["details"]["metrics"]
        rows = [tmp_path / each / column["samples"] for each in ("whole", "out")]
        assert rows[0].read_bytes() == rows[1].read_bytes()


def test_kept_epochs_are_dropped_when_their_column_is_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = recipe("patch", CELLS, patch={**PATCH, "epochs": 1})
    how = probing(data, cells, recipe("zero-shot", GRAY))
    stopped(CLIP, how, tmp_path / "out", monkeypatch)
    assert not list((tmp_path / "out.unfinished").rglob("*.safetensors"))


def test_another_projection_in_the_same_place_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_projection(tmp_path / "projection")
    how = probing(data, recipe("zero-shot", SINGLE, GRAY))
    stopped(place, how, tmp_path / "out", monkeypatch)
    scale(place / "projection.safetensors", lambda name: name == "weight")
    with pytest.raises(UserError, match="--resume: the model is not that of the unfinished"):
        probe(str(place), how, tmp_path / "out", resume=True)


def write_projection(folder: Path) -> Path:
    from kuea_mllm.teachers.load import load_teacher
    from kuea_mllm.towers.reading.load import load_tower

    clip = load_tower(CLIP)
    teacher = load_teacher(ASSETS / "teacher", image_size=clip.spec.image_size)
    folder.mkdir()
    torch.manual_seed(0)
    weight = torch.randn(clip.spec.embedding_width, teacher.width)
    save_file({"weight": weight}, folder / "projection.safetensors")
    start = {"reference": str(CLIP), "fingerprint": clip.fingerprint}
    record = {
        "reference": str(ASSETS / "teacher"),
        "fingerprint": teacher.fingerprint,
        "readout": "cls",
        "normalisation": "own",
        "image_size": clip.spec.image_size,
    }
    content = {"kind": "projection", "base_tower": start, "teacher": record}
    write_json(folder / "kuea.json", content)
    return folder
