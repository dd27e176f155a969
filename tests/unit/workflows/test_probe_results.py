"""Columns of probes become results that `compare` reads, wherever the data lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kuea_mllm.config.probe import SUITES, ProbeRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.evaluation.results import KIND, SCHEMA_VERSION, load_results
from kuea_mllm.io import write_json
from kuea_mllm.probing.column import ProbeColumn, ProbeRow
from kuea_mllm.reporting.pictures import PictureShelf
from kuea_mllm.workflows.probe_results import result_columns, write_columns
from kuea_mllm.workflows.probe_suites import Job, JobColumns, plan_jobs


class Pictures:
    """Pictures with names as members of an archive."""

    def __init__(self, root: str, count: int) -> None:
        self.root, self.count = root, count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.root}/test/0.tar!{index:03d}.jpg"

    def read(self, index: int) -> Image.Image:
        pixels = np.full((16, 16, 3), index, dtype=np.uint8)
        return Image.fromarray(pixels)

    def fingerprint(self) -> str:
        return f"pictures-{self.count}"


def make_job(**changes: Any) -> Job:
    content = {
        "kind": "probe",
        "suite": "zero-shot",
        "datasets": [
            {
                "name": "toy set",
                "key": "toy",
                "source": "nowhere",
                "layout": "wds",
                "metric": "acc1",
                "documents": 6,
                "faults": ["raw_pixels"],
                "expected": [{"column": "toy set", "table": 1, "scores": {"ViT-L-14": 50}}],
            }
        ],
        "averages": {"Average zero-shot": ["toy set"]},
        **changes,
    }
    [job] = plan_jobs([ProbeRecipe.parse(content, origin="of a test")])
    return job


def make_columns(
    scores: Sequence[float], root: str = "/here", *, templates: tuple[str, ...] = ("a {c}",)
) -> JobColumns:
    pictures = Pictures(root, len(scores))
    rows = [
        ProbeRow(
            doc_id=index,
            cluster=pictures.name(index),
            question=f"Which image shows: caption {index}",
            target=pictures.name(index),
            answer=pictures.name(0),
            score=score,
            group="ab"[index % 2],
            image=pictures.name(index),
        )
        for index, score in enumerate(scores)
    ]
    details = {
        "templates": list(templates),
        "dataset": {"split": "test", "fingerprint": "sha256:toy"},
    }
    column = ProbeColumn(
        "toy set", "acc1", 100 * float(np.mean(scores)), "mean", rows, "zero-shot", details
    )
    return JobColumns([column], pictures, root)


def write_results(
    folder: Path, found: JobColumns, job: Job | None = None, name: str = "tower"
) -> Path:
    job = job or make_job()
    entries = write_columns(folder, result_columns(job, found), found, thumbnails=2)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "model": {"path": name, "name": name, "adapter": "tower", "tower_fingerprint": name},
        "columns": entries,
        "settings": {"limit": None, "limit_seed": None, "suite": "probe-zero-shot"},
        "versions": {},
        "created": "now",
    }
    write_json(folder / "summary.json", summary)
    return folder


def test_two_results_are_compared_by_picture(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", make_columns([1, 0, 1, 0, 0, 0]), name="a")
    after = write_results(tmp_path / "b", make_columns([1, 1, 1, 1, 0, 0]), name="b")
    column = compare_results(before, after).columns["probe_zero_shot_toy_set"]
    assert column.baseline == pytest.approx(1 / 3)
    assert column.difference == pytest.approx(1 / 3)
    assert (column.improved.doc_ids, column.worsened.count) == ((1, 3), 0)
    assert (column.n, column.clusters) == (6, 6)
    assert column.protocol == "clip-benchmark"
    assert column.part == "Average zero-shot"


def test_copies_of_a_data_set_are_the_same_test(tmp_path: Path) -> None:
    here = write_results(tmp_path / "a", make_columns([1, 0, 1, 0], "/here"), name="a")
    there = write_results(tmp_path / "b", make_columns([1, 0, 1, 1], "/mnt/there"), name="b")
    assert compare_results(here, there).columns["probe_zero_shot_toy_set"].is_paired
    [row, *_] = load_results(here).rows("probe_zero_shot_toy_set")
    assert (row.cluster, row.target) == ("test/0.tar!000.jpg", "test/0.tar!000.jpg")
    assert row.image is None


def test_pictures_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "data" / "0.png")
    row = ProbeRow(0, "data/0.png", "?", "a", "a", 1.0, image="data/0.png")
    column = ProbeColumn("toy set", "acc1", 100.0, "mean", [row], "zero-shot")
    found = JobColumns([column], Pictures("data", 0), "data")
    monkeypatch.chdir(tmp_path)
    folder = write_results(tmp_path / "results", found)
    monkeypatch.chdir(folder)
    [kept] = load_results(folder).rows("probe_zero_shot_toy_set")
    # What belongs to the test says nothing of folders.
    assert (kept.image, kept.cluster) == (str(tmp_path / "data" / "0.png"), "0.png")
    task, sample = "probe_zero_shot_toy_set", kept.to_json()
    assert PictureShelf([folder]).load(task, sample)[0] is not None
    # Results of earlier versions hold the path as it was given.
    before = sample | {"image": "data/0.png"}
    assert "is not in" in PictureShelf([folder]).load(task, before)[1]
    monkeypatch.chdir(tmp_path)
    assert PictureShelf([folder]).load(task, before)[0] is not None


@pytest.mark.parametrize(
    ("job", "templates", "expected"),
    [
        (make_job(compat="released"), ("a {c}",), "protocols"),
        (make_job(), ("the {c}",), "task versions"),
    ],
    ids=["faults", "templates"],
)
def test_other_rules_are_another_test(
    tmp_path: Path, job: Job, templates: tuple[str, ...], expected: str
) -> None:
    first = write_results(tmp_path / "a", make_columns([1, 0]), name="a")
    columns = make_columns([1, 0], templates=templates)
    second = write_results(tmp_path / "b", columns, job, name="b")
    with pytest.raises(EvaluationError, match=f"different {expected}"):
        compare_results(first, second)


def test_score_that_does_not_follow_from_the_rows_is_refused() -> None:
    found = make_columns([1, 0])
    [column] = found.columns
    wrong = ProbeColumn(**{name: getattr(column, name) for name in column.__slots__})
    object.__setattr__(wrong, "score", 51.0)
    with pytest.raises(EvaluationError, match=r"its score is 51\.0, its rows give 50\.0"):
        result_columns(make_job(), JobColumns([wrong], found.images, found.root))


def test_macro_recall_is_that_of_all_pictures_together() -> None:
    counts = [{"sky": [1, 1]}, {"sky": [0, 3], "dog": [1, 2]}, {"dog": [2, 2]}]
    rows = [
        ProbeRow(index, f"{index}.png", "?", "", "", None, counts=count)
        for index, count in enumerate(counts)
    ]
    recall = 100 * (1 / 4 + 3 / 4) / 2
    column = ProbeColumn("local", "macro recall", recall, "macro_recall", rows, "patch")
    job = make_job(suite="patch", patch={}, averages={})
    [found] = result_columns(job, JobColumns([column], Pictures("/", 3), "/"))
    assert found.entry["score"] == pytest.approx(0.5)
    assert found.entry["protocol"] == "patch-seg"
    assert [row.score for row in found.rows] == [1.0, 0.25, 1.0]
    assert found.rows[1].counts == counts[1]


def test_scores_of_many_classes_are_not_shown() -> None:
    rows = [
        ProbeRow(index, str(index), "?", "", "", 1.0, group=f"class {index}") for index in range(30)
    ]
    column = ProbeColumn("toy set", "acc1", 100.0, "mean", rows, "zero-shot")
    found = JobColumns([column], Pictures("/", 30), "/")
    assert result_columns(make_job(), found)[0].entry["breakdown"] == {}
    assert result_columns(make_job(), make_columns([1, 0, 1, 1]))[0].entry["breakdown"] == {
        "a": 1.0,
        "b": 0.5,
    }


def test_pictures_are_kept_spread_over_the_set(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "a", make_columns([1, 0, 1, 0, 1]))
    lines = (folder / "thumbnails" / "probe_zero_shot_toy_set.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [entry["doc_id"] for entry in kept] == [0, 4]
    for entry in kept:
        picture = Image.open(folder / "thumbnails" / "pictures" / entry["picture"])
        assert picture.getpixel((0, 0)) == (entry["doc_id"],) * 3


def test_columns_about_the_same_pictures_do_not_narrow_the_average(tmp_path: Path) -> None:
    before, after = [1, 0] * 30, [1, 1, 0, 1] * 15
    widths = []
    for pictures in ("shared", "own {}"):
        folders = []
        for name, scores in (("a", before), ("b", after)):
            folder = write_results(tmp_path / f"{pictures}-{name}", make_columns(scores), name=name)
            summary = json.loads((folder / "summary.json").read_text())
            [(task, entry)] = summary["columns"].items()
            summary["columns"] = {
                f"{task}{k}": {
                    **entry,
                    "task": f"{task}{k}",
                    "column": f"R@{k}",
                    "pictures": pictures.format(k),
                }
                for k in (1, 5, 10)
            }
            write_json(folder / "summary.json", summary)
            folders.append(folder)
        comparison = compare_results(*folders, resamples=2000)
        average, column = comparison.average, comparison.columns["probe_zero_shot_toy_set1"]
        assert average is not None and average.low is not None and average.high is not None
        assert column.low is not None and column.high is not None
        widths.append((average.high - average.low) / (column.high - column.low))
    assert widths[0] == pytest.approx(1.0, abs=0.1)
    assert widths[1] < 0.75


def test_names_are_unique_over_all_suites() -> None:
    recipes = [load_recipe(f"probe/{s.replace('-', '_')}", ProbeRecipe) for s in SUITES]
    jobs = plan_jobs(recipes)
    assert len({job.name for job in jobs}) == len(jobs) == 16 + 2 + 4 + 1 + 1
    chosen = plan_jobs(recipes, ["svhn"])
    assert [job.name for job in chosen] == ["zero_shot_svhn", "linear_svhn"]
