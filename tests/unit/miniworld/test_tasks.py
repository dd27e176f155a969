"""The task files are complete and score known answers right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from kuea_mllm.errors import OutputError
from kuea_mllm.io import read_json
from kuea_mllm.miniworld import scoring
from kuea_mllm.miniworld.images import contact_sheet, write_images
from kuea_mllm.miniworld.mixture import write_mixture
from kuea_mllm.miniworld.tasks import TASKS, write_tasks


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: ("function", node.value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "tasks"
    names = write_tasks(folder, split="test", questions_per_task=60, seed=0)
    assert names == [
        "miniworld_pope",
        "miniworld_vqa",
        "miniworld_textvqa",
        "miniworld_refcoco",
    ]
    return folder


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / "data" / f"{name}.parquet").to_pylist()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_task_file_names_real_functions(folder: Path, task: Any) -> None:
    text = (folder / f"{task.name}.yaml").read_text(encoding="utf-8")
    content = yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader with one more tag
    assert content["task"] == task.name
    assert content["output_type"] == "generate_until"
    assert content["cluster_key"] == "image_id"
    assert content["generation_kwargs"]["do_sample"] is False
    assert content["metric_list"][0]["metric"] == task.metrics[0][0]
    data = content["dataset_kwargs"]["data_files"]["test"]
    assert (folder / data).is_file()
    functions = [content[key][1] for key in ("doc_to_visual", "doc_to_text", "process_results")]
    functions += [metric["aggregation"][1] for metric in content["metric_list"]]
    for function in functions:
        module, _, name = function.rpartition(".")
        assert module == scoring.__name__
        assert callable(getattr(scoring, name))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_right_answers_score_full_and_wrong_ones_nothing(folder: Path, task: Any) -> None:
    process = getattr(scoring, task.process)
    metric = task.metrics[0][0]
    rows = _rows(folder, task.name)
    right = [process(row, [row["answer"]])[metric] for row in rows]
    assert scoring.mean_score(right) == 1.0
    assert {item["image_id"] for item in right} == {row["image_id"] for row in rows}
    assert scoring.mean_score([process(row, ["nothing"])[metric] for row in rows]) == 0.0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_pictures_have_several_questions(folder: Path, task: Any) -> None:
    rows = _rows(folder, task.name)
    assert len(rows) == 60
    assert len({row["question_id"] for row in rows}) == 60
    assert len({row["image_id"] for row in rows}) <= 25


def test_pope_asks_six_balanced_questions_per_picture(folder: Path) -> None:
    rows = _rows(folder, "miniworld_pope")
    assert len({row["image_id"] for row in rows}) == 10
    assert sum(row["answer"] == "yes" for row in rows) == 30


def test_parquet_holds_pictures_for_the_datasets_library(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_parquet(
        str(folder / "data" / "miniworld_refcoco.parquet"), cache_dir=str(tmp_path)
    )
    assert data[0]["image"].size == (32, 32)
    assert len(data[0]["bbox"]) == 4


def test_tasks_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        write_tasks(tmp_path / name, split="test", questions_per_task=60, seed=seed)
    assert _rows(tmp_path / "same", "miniworld_vqa") == _rows(folder, "miniworld_vqa")
    assert _rows(tmp_path / "other", "miniworld_vqa") != _rows(folder, "miniworld_vqa")


def test_tasks_never_overwrite(folder: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        write_tasks(folder, split="test", questions_per_task=10, seed=0)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.25, 0.50, 0.50, 0.75]", (0.25, 0.5, 0.5, 0.75)),
        ("It is at [0,0.5,1,1].", (0.0, 0.5, 1.0, 1.0)),
        ("[0.25, 0.50, 0.50]", None),
        ("[0.2.5, 0.50, 0.50, 1]", None),
        ("", None),
    ],
)
def test_parse_box(text: str, box: tuple[float, ...] | None) -> None:
    assert scoring.parse_box(text) == box


def test_box_overlap() -> None:
    cell = (0.25, 0.25, 0.5, 0.5)
    assert scoring.box_iou(cell, cell) == 1.0
    assert scoring.box_iou((0.25, 0.25, 0.5, 0.75), cell) == pytest.approx(0.5)
    assert scoring.box_iou((0.5, 0.25, 0.75, 0.5), cell) == 0.0
    assert scoring.box_iou((0.5, 0.5, 0.25, 0.25), cell) == 0.0
    assert scoring.box_iou(None, cell) == 0.0


def test_half_overlap_is_not_enough() -> None:
    row = {"bbox": [0.25, 0.25, 0.5, 0.5], "image_id": "a"}
    item = scoring.process_box(row, ["[0.25, 0.25, 0.50, 0.75]"])
    assert item["iou_over_50"]["score"] == 0.0
    assert item["mean_iou"]["score"] == pytest.approx(0.5)


def test_pope_counts_predictions() -> None:
    rows = [{"answer": answer, "image_id": "a"} for answer in ("yes", "yes", "no", "no")]
    answers = ["Yes.", "no", "yes", "No, there is none"]
    items = [
        scoring.process_pope(row, [answer])["accuracy"]
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert scoring.mean_score(items) == 0.5
    assert scoring.f1_score(items) == 0.5
    assert scoring.yes_ratio(items) == 0.5
    silent = [scoring.process_pope(rows[2], [""])["accuracy"]]
    assert scoring.f1_score(silent) == 0.0


def test_write_images_makes_numbered_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "images", split="train", count=3, seed=0)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert [str(path) for path in files] == [f"images/00/00000{n}.png" for n in (1, 2, 3)]
    with Image.open(tmp_path / files[0]) as picture:
        assert picture.size == (32, 32)
        assert picture.mode == "RGB"


def test_contact_sheet_shows_a_grid() -> None:
    sheet = contact_sheet(rows=2, columns=3, scale=4)
    assert sheet.width == 3 * (128 + 10) + 10
    assert np.asarray(sheet).std() > 20


def test_mixture_is_in_llavas_format(tmp_path: Path) -> None:
    path = write_mixture(tmp_path / "mixture", split="train", count=4, seed=0, turns=2)
    records = read_json(path)
    assert len(records) == 4
    for record in records:
        assert (path.parent / "images" / record["image"]).is_file()
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt", "human", "gpt"]
        assert record["conversations"][0]["value"].startswith("<image>\n")
        assert "<image>" not in record["conversations"][2]["value"]
