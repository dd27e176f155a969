"""Differences between two towers in one Flamingo, and how they are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kuea_mllm.miniworld.flamingo_eval import FewShotScores
from kuea_mllm.reporting.shots import shots_comparison_text, shots_table, shots_text
from kuea_mllm.workflows.studies.flamingo import compare_in_flamingo, differences


def scores(caption: list[float], count: list[float]) -> FewShotScores:
    return FewShotScores({"caption": {0: caption}, "count": {0: count}}, 1.0)


def test_differences_are_paired_and_in_points() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(200)
    found = differences(
        scores(before.tolist(), [0.0] * 200), scores((before + 0.1).tolist(), [0.0] * 200)
    )["0"]
    assert found["caption"]["difference"] == pytest.approx(10)
    assert found["count"]["difference"] == 0
    assert found["average"]["difference"] == pytest.approx(5)
    low, high = found["caption"]["low"], found["caption"]["high"]
    # Every question gained the same: unpaired scores would be spread over 80 points.
    assert low is not None and high is not None
    assert 5 < low <= 10 <= high < 15


RECORD: dict[str, Any] = {
    "models": {
        "original": {"0": {"caption": 80.0, "average": 80.0}},
        "aligned": {"0": {"caption": 81.25, "average": 81.25}},
    },
    "differences": {
        "0": {
            "caption": {"difference": 1.25, "low": -0.5, "high": 3.0},
            "average": {"difference": 1.25, "low": None, "high": None},
        }
    },
}


def test_table_has_a_row_for_each_tower_and_the_difference() -> None:
    table = shots_table(RECORD)
    assert tuple(table.header) == ("Shots", "Tower", "caption", "average")
    assert [tuple(row) for row in table.rows] == [
        ("0", "original", "80.0", "80.0"),
        ("0", "aligned", "81.2", "81.2"),
        ("0", "difference", "+1.2 [-0.5, +3.0]", "+1.2"),
    ]


def test_terminal_shows_the_same() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(shots_comparison_text(RECORD))
        console.print(shots_text(RECORD["models"]["original"]))
    assert "+1.2 [-0.5, +3.0]" in captured.get()
    assert captured.get().count("80.0") == 4


def test_towers_are_swapped_and_asked_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import CLIPModel

    from kuea_mllm.miniworld import ASSETS
    from kuea_mllm.miniworld.flamingo import (
        make_flamingo,
        make_flamingo_processor,
        save_flamingo,
    )
    from kuea_mllm.swapping import tower_fingerprint_of, verify_model
    from kuea_mllm.towers.reading.load import load_tower
    from kuea_mllm.towers.writing.save import save_tower
    from kuea_mllm.workflows.studies import flamingo as module

    processor = make_flamingo_processor()
    torch.manual_seed(0)
    model: Any = make_flamingo(CLIPModel.from_pretrained(ASSETS / "clip"), processor)
    save_flamingo(model, processor, tmp_path / "base")
    tower = load_tower(ASSETS / "clip")
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.mul_(1.01)
    save_tower(tower, tmp_path / "tower", manifest={})
    asked: list[tuple[Path, dict[str, Any]]] = []

    def score(place: Path, **options: Any) -> FewShotScores:
        asked.append((place, options))
        return scores([0.0, 1.0] * 5, [1.0, 0.0] * 5)

    monkeypatch.setattr(module, "score_flamingo", score)
    record = compare_in_flamingo(
        tmp_path / "base", tmp_path / "tower", tmp_path / "out", questions=10, seed=3
    )
    assert [place for place, _ in asked] == [tmp_path / "base", tmp_path / "out"]
    assert asked[0][1] == asked[1][1] == {"questions": 10, "seed": 3}
    assert record["fingerprints"]["aligned"] == tower.fingerprint
    assert verify_model(tmp_path / "out", tower=tower).is_good
    from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter

    assert (
        tower_fingerprint_of(tmp_path / "base", OpenFlamingoAdapter())
        == (record["fingerprints"]["original"])
    )
    assert record["models"]["original"]["0"]["average"] == pytest.approx(50)
