"""Several runs of one system, several candidates of one baseline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare_data import make_row, scores_of, write_results, write_rows_of

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.comparing.compare import compare_systems, comparisons_json
from kuea_mllm.evaluation.comparing.systems import load_systems


def test_seeds_are_averaged_and_their_spread_is_told_apart(tmp_path: Path) -> None:
    runs = {}
    for name, rights in (("base", (50, 52, 54)), ("new", (60, 66, 72))):
        for seed, right in enumerate(rights):
            runs[f"{name}{seed}"] = write_results(
                tmp_path / f"{name}{seed}", {"x": scores_of(200, right), "y": scores_of(200, right)}
            )
    arguments = [f"{name[:-1]}={path}" for name, path in runs.items()]
    (found,) = compare_systems(load_systems(arguments), resamples=500)
    column = found.columns["x"]
    assert column.difference == pytest.approx((10 + 14 + 18) / 600)
    assert (column.baseline, column.candidate) == (pytest.approx(0.26), pytest.approx(0.33))
    assert column.seeds is not None
    assert column.seeds.differences == (
        pytest.approx(0.05),
        pytest.approx(0.07),
        pytest.approx(0.09),
    )
    assert column.seeds.std == pytest.approx(0.02)
    assert column.test == "bootstrap"
    # Question 60 is won by seeds 1 and 2, question 50 by seed 0 alone, question 72 by none.
    assert column.improved.doc_ids == tuple(range(50, 72))
    assert (column.n, column.clusters) == (200, 200)
    content = found.to_json()
    assert [run["path"] for run in content["baseline"]["runs"]] == [
        str(runs[f"base{seed}"]) for seed in range(3)
    ]
    assert content["candidate"]["label"] == "new"
    assert content["average"]["seeds"]["count"] == 3
    json.dumps(content, allow_nan=False)


def test_seeds_of_different_worlds_are_drawn_apart(tmp_path: Path) -> None:
    def world(name: str, seed: int, right: int) -> str:
        rows = [
            replace(make_row(i, float(i < right), f"{seed}-{i}"), question=f"{seed} {i}")
            for i in range(100 * seed)
        ]
        return f"{name}={write_rows_of(tmp_path / f'{name}{seed}', rows, 'mean')}"

    arguments = [
        world("base", 1, 50),
        world("base", 2, 100),
        world("new", 1, 60),
        world("new", 2, 150),
    ]
    (found,) = compare_systems(load_systems(arguments), resamples=2000)
    column = found.columns["t"]
    assert column.difference == pytest.approx((0.10 + 0.25) / 2)
    assert (column.n, column.clusters) == (300, 300)
    assert (column.improved.count, column.improved.doc_ids) == (60, ())
    variance = (0.1 * 0.9 / 100 + 0.25 * 0.75 / 200) / 4
    assert column.low is not None
    assert column.high is not None
    assert column.high - column.low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.1)


def test_one_baseline_stands_against_all_seeds(tmp_path: Path) -> None:
    base = write_results(tmp_path / "base", {"x": scores_of(100, 50)})
    seeds = [write_results(tmp_path / f"s{i}", {"x": scores_of(100, 60 + i)}) for i in range(2)]
    systems = load_systems([str(base), *(f"new={path}" for path in seeds)])
    (found,) = compare_systems(systems, resamples=500)
    assert found.columns["x"].difference == pytest.approx(0.105)
    with pytest.raises(EvaluationError, match=r"the baseline has 2 runs \(.*\), the candidate 1"):
        compare_systems(load_systems([*(f"new={path}" for path in seeds), str(base)]))


def test_several_candidates_have_one_baseline(tmp_path: Path) -> None:
    paths = [
        write_results(tmp_path / n, {"x": scores_of(100, r)})
        for n, r in zip("abc", (50, 60, 9), strict=True)
    ]
    content = comparisons_json(compare_systems(load_systems([*map(str, paths)]), resamples=500))
    assert content["kind"] == "comparisons"
    assert [pair["columns"]["x"]["verdict"] for pair in content["pairs"]] == ["better", "worse"]
    # All three models are called "m".
    assert [pair["candidate"]["label"] for pair in content["pairs"]] == [*map(str, paths[1:])]
    assert any("One of 2 candidates" in text for text in content["pairs"][0]["warnings"])


def test_seeds_that_agree_are_not_said_to_spread(tmp_path: Path) -> None:
    base = write_results(tmp_path / "base", {"x": scores_of(60, 30)})
    equal = [write_results(tmp_path / f"new{n}", {"x": scores_of(60, 30)}) for n in range(2)]
    systems = load_systems([str(base), *(f"new={path}" for path in equal)])
    (comparison,) = compare_systems(systems, resamples=200)
    note = comparison.columns["x"].note
    assert (
        note
        == "no cluster's total changed: the interval is what this many clusters could have missed."
    )
