"""The benchmarks of OpenFlamingo run, and measure what their heads say."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALL = ["--queries=4", "--pool=3", "--batch=2", "--shots=2", "--new-tokens=2", "--rounds=1"]


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a file of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module(request.param)


generate = pytest.mark.parametrize("benchmark", ["flamingo_generate"], indirect=True)
precision = pytest.mark.parametrize("benchmark", ["flamingo_precision"], indirect=True)


@generate
def test_both_ways_of_generation_give_the_same_answers(
    benchmark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: dict[str, int] = {}
    # Images that each way sends through the tower, the warm-up included.
    for name in ("one_by_one", "batched"):
        way = getattr(benchmark, name)

        def counted(model: Any, *given: Any, way: Any = way, name: str = name) -> Any:
            seen: list[int] = []
            hook = model.model.vision_tower.register_forward_hook(
                lambda _, __, output: seen.append(len(output.last_hidden_state))
            )
            answers = way(model, *given)
            hook.remove()
            ways[name] = sum(seen)
            return answers

        monkeypatch.setattr(benchmark, name, counted)
    benchmark.main(SMALL)
    result = json.loads(capsys.readouterr().out)
    assert result["same_answers"] == 1
    rates = result["samples_per_second"]
    assert rates["one by one"] > 0 and rates["batched"] > 0
    # Every demonstration of every query anew; each of the pool once.
    assert ways == {"one_by_one": 4 * (2 + 1), "batched": 3 + 4}


@generate
def test_memory_is_measured_part_by_part(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(["--memory", "--size=tiny", "--shots=2"])
    result = json.loads(capsys.readouterr().out)
    counts = dict(result["parameters"])
    assert counts.pop("all") == sum(counts.values())
    assert result["images"] == 3
    peak = result["peak_gib"]
    assert peak["imports"] <= peak["weights"] <= peak["forward"]


@precision
def test_middle_sized_model_in_half_precision_keeps_the_stated_bounds(benchmark: Any) -> None:
    document = (ROOT / "docs" / "openflamingo.md").read_text()
    bounds = re.findall(r"^\| (b?float16) \|.*\| ([\d.]+) \| ([\d.]+) \|$", document, re.M)
    assert [name for name, *_ in bounds] == ["bfloat16", "float16"]
    model = benchmark.random_model(benchmark.middle_config())
    given = benchmark.make_prompts(model.config, rows=1, shots=2)
    found = benchmark.measure(model, [getattr(torch, name) for name, *_ in bounds], given)
    for name, error, cosine in bounds:
        assert 0 < found[name]["error"] <= float(error), name
        assert found[name]["cosine"] >= float(cosine), name


@precision
def test_prompts_hold_an_image_before_each_demonstration(benchmark: Any) -> None:
    config = benchmark.middle_config()
    given = benchmark.make_prompts(config, rows=2, shots=3)
    assert given["pixel_values"].shape[:2] == (2, 4)
    for row in given["input_ids"].tolist():
        assert row.count(config.image_token_id) == 4
        assert row.count(config.endofchunk_token_id) == 3
        assert row[0] == config.image_token_id
