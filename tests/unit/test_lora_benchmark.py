"""The benchmark of a tuning runs, and trains the same samples both ways."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the file, which is in no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    # Child processes are for their memory, and share what a test looks at otherwise.
    module = importlib.import_module("lora_step")
    monkeypatch.setattr(
        module, "measure", lambda setting, name: module._measure(setting, name) | {"peak_gib": 0.5}
    )
    yield module


@pytest.mark.parametrize("packing", [False, True])
def test_both_variants_train_every_sample(
    packing: bool,
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    trained: dict[str, int] = {"stock": 0, "ours": 0}
    adapter = importlib.import_module("lora_parts.models").RandomLlava
    forward = LlavaForConditionalGeneration.forward
    hidden_states = adapter.hidden_states

    # Wrapped, since the stock trainer looks at the arguments' names.
    @functools.wraps(forward)
    def counted(model: Any, *given: Any, **named: Any) -> Any:
        trained["stock"] += int(named["attention_mask"].sum())
        return forward(model, *given, **named)

    def counted_too(own: Any, model: Any, batch: Any) -> Any:
        trained["ours"] += int(batch.get("attention_mask", torch.zeros(0)).sum())
        trained["ours"] += batch["input_ids"].numel() if "position_ids" in batch else 0
        return hidden_states(own, model, batch)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", counted)
    monkeypatch.setattr(adapter, "hidden_states", counted_too)
    given = ["--rounds=1", "--samples=8", "--json", *(["--packing"] if packing else [])]
    benchmark.main(given)
    found = json.loads(capsys.readouterr().out)
    _, tokens = _lengths(8, max_length=128, image_tokens=16)
    assert trained["stock"] == 2 * tokens.sum()
    # Packed rows of one micro-batch are filled up to the longest.
    assert trained["ours"] >= 2 * tokens.sum()
    assert packing or trained["ours"] == 2 * tokens.sum()
    for row in found["variants"].values():
        assert row["tokens_per_second"] > 0
    assert found["variants"]["stock"]["ratio_to_stock"] == 1
    assert 0 < found["predicted"]["tensors_gib"] < found["predicted"]["all_gib"]


def test_synthetic_mixture_has_the_shares_of_its_sources(benchmark: Any) -> None:
    lengths, tokens = _lengths(20_000, max_length=2048, image_tokens=576)
    assert float((lengths < 0).mean()) == pytest.approx(40_688 / 665_298, abs=0.01)
    assert tokens.max() == 2048
    assert tokens[lengths > 0].min() > 576
    assert (lengths != 0).all()


def test_padding_table_is_what_the_orders_give(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(["--padding", "--samples=3000"])
    found = json.loads(capsys.readouterr().out)
    _, tokens = _lengths(3000, max_length=2048, image_tokens=576)
    shuffled = tokens[np.random.default_rng(1).permutation(3000)][: 4 * 750].reshape(750, 4)
    expected = 1 - tokens.sum() / (4 * shuffled.max(axis=1)).sum()
    assert found["padding"]["4"]["random"] == pytest.approx(expected)
    packing = found["packing"]
    assert packing["filled"] == pytest.approx(tokens.sum() / (2048 * packing["rows"]))
    assert packing["rows"] >= tokens.sum() / 2048


def _lengths(count: int, **settings: Any) -> Any:
    return importlib.import_module("lora_parts.samples").mixture_lengths(count, **settings)
