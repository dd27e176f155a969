"""The encoder study of the mini world: its data sets, and one small study from end to end."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.probe_sets import CAPTIONED, LABELLED, PAIRS, write_probe_sets
from kuea_mllm.reporting.probe_study import probe_study_markdown
from kuea_mllm.workflows.probe_suites import plan_jobs, require_data
from kuea_mllm.workflows.studies import probe_study
from kuea_mllm.workflows.studies.probe_study import TOWERS, ProbeStudySettings, miniworld_recipes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "data"
    write_probe_sets(folder, split="test", per_set=30, train=40)
    return folder


def test_every_data_set_of_the_recipes_is_written(data: Path) -> None:
    jobs = plan_jobs(miniworld_recipes(ProbeStudySettings("test", 30, 40)))
    require_data(jobs, data)
    assert {job.data.key for job in jobs} == {path.name for path in data.iterdir()}
    assert len({job.name for job in jobs}) == len(jobs)


def test_pictures_are_the_same_each_time(data: Path, tmp_path: Path) -> None:
    write_probe_sets(tmp_path / "again", split="test", per_set=30, train=40)
    for path in sorted(data.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(data)).read_bytes()


def test_label_maps_name_the_digits_of_their_cells(data: Path) -> None:
    from kuea_mllm.probing.patch_labels import open_coco_stuff

    pictures = open_coco_stuff(data / LABELLED, "val")
    assert len(pictures) == 30
    stored = np.asarray(Image.open(pictures.label_file(0)))
    cells = stored.reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(16, 64)
    # One value in each cell; 255 where there is no digit.
    assert (cells == cells[:, :1]).all()
    digits = set(cells[:, 0].tolist()) - {255}
    assert 1 <= len(digits) <= 4
    assert digits <= set(range(10))


def test_statements_of_a_pair_differ(data: Path) -> None:
    with (data / PAIRS / "Questions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["pattern"] == second["pattern"]
        assert first["statement"] != second["statement"]
        assert int(first["id"]) % 2 == 1
    assert {row["pattern"].split()[0] for row in rows} == {"Presence", "Quantity", "State"}


def test_captions_name_what_is_in_the_picture(data: Path) -> None:
    from kuea_mllm.probing.datasets.karpathy import open_karpathy

    dataset = open_karpathy(data / CAPTIONED, "test", name="pictures")
    captions = dataset.require_captions()
    assert {len(each) for each in captions} == {5}
    assert all(text.endswith("background") for each in captions for text in each)


def difference(value: float, verdict: str, changes: list[float]) -> dict[str, Any]:
    seeds = {"differences": changes, "low": value - 0.02, "high": value + 0.02}
    return {
        "difference": value,
        "low": value - 0.01,
        "high": value + 0.01,
        "verdict": verdict,
        "seeds": seeds,
        "baseline": 0.5,
        "n": 1000,
    }


def test_tables_show_both_kinds_of_interval() -> None:
    score = {"mean": 50.0, "per_seed": [49.0, 51.0], "suite": "probe-zero-shot"}
    kernel = difference(0.03, "better", [0.02, 0.04])
    lost = difference(-0.03, "worse", [-0.07, 0.01])
    record = {
        "seeds": [0, 1],
        "scores": {"original": {"single": score}},
        "differences": {
            "kernel": {"columns": {"single": kernel}, "averages": {"Average zero-shot": kernel}},
            "projection": {"columns": {"single": lost}, "averages": {}},
        },
    }
    lines = probe_study_markdown(record).splitlines()
    assert "n = 1,000 questions in each column and world" in lines[0]
    rows = [line for line in lines if line.startswith("| zero-shot: single")]
    assert rows == [
        "| zero-shot: single | 50.0 | +3.0 [+2.0, +4.0] ▲ | -3.0 [-4.0, -2.0] ▼ |",
        "| zero-shot: single | 50.0 | +3.0 [+1.0, +5.0] (2/2) | -3.0 [-5.0, -1.0] (1/2) |",
    ]
    assert "| **Average zero-shot** | 50.0 | +3.0 [+2.0, +4.0] ▲ |  |" in lines


@pytest.mark.slow
def test_small_study_compares_all_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(tmp_path / "cache"))
    worlds = tmp_path / "worlds"
    worlds.mkdir()
    (worlds / "seed0").symlink_to(ASSETS)
    out = tmp_path / "study"

    def run() -> dict[str, Any]:
        return probe_study.run_probe_study(
            out,
            seeds=1,
            worlds=worlds,
            per_set=40,
            probe_train=96,
            patch_epochs=1,
            train_images=256,
            align_steps=3,
        )

    record = run()
    assert set(record["scores"]) == set(TOWERS)
    assert set(record["differences"]) == set(TOWERS) - {"original"}
    columns = set(record["scores"]["original"])
    assert {"single", "pictures T2I R@10", "digit linear", "local", "global", "pairs"} <= columns
    # A projection has no patch tokens.
    assert columns - set(record["scores"]["projection"]) == {"local", "global"}
    for name, content in record["differences"].items():
        for column, found in content["columns"].items():
            scores = record["scores"]
            change = scores[name][column]["mean"] - scores["original"][column]["mean"]
            assert 100 * found["difference"] == pytest.approx(change)
    assert (out / "report.html").is_file()

    def fail(*_: Any) -> None:
        raise AssertionError("the world was measured before")

    monkeypatch.setattr(probe_study, "_study_seed", fail)
    assert run()["differences"] == record["differences"]
