"""Ends of a tuning that are easily forgotten: nothing to do, no epoch to repeat, a broken merge."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "invariance"))
from tuning_world import make_world, recipe_of

from kuea_mllm.errors import EnvironmentFailure, RecipeError
from kuea_mllm.tuning import run as tuning_run
from kuea_mllm.tuning.loss import chunked_cross_entropy
from kuea_mllm.tuning.run import run_tuning


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("review")
    make_world(folder)
    return folder


def test_nothing_to_predict_reaches_an_output_layer_that_trains() -> None:
    # Several processes wait for the gradient of everything that trains.
    hidden = torch.ones(0, 4, requires_grad=True)
    weight, bias = torch.ones(5, 4, requires_grad=True), torch.ones(5, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    chunked_cross_entropy(hidden, weight, bias, nothing, chunk=8).backward()
    assert weight.grad is not None and not weight.grad.any()
    assert bias.grad is not None and not bias.grad.any()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"optim__last_update": "drop", "optim__batch_size": 64},
            r"optim\.last_update' is drop, and the 38 micro-batches .* one update of 64",
        ),
        (
            {"data__order": "released", "optim__epochs": None, "optim__steps": 6},
            r"data\.order' is released.* 6 updates .* an epoch has 5",
        ),
    ],
)
def test_epoch_that_cannot_be_is_refused(
    world: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecipeError, match=named):
        run_tuning(recipe_of(world, **changes), tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_run_whose_merge_failed_is_resumed_to_its_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(world, optim__epochs=1)
    whole = run_tuning(recipe, tmp_path / "whole", progress=False)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tuning_run, "merge_adapter", full)
        with pytest.raises(EnvironmentFailure, match="no space left"):
            run_tuning(recipe, tmp_path / "out", merge=True, progress=False)
    found = run_tuning(recipe, tmp_path / "out", merge=True, resume=True, progress=False)
    assert found.merged is not None and (found.merged / "config.json").is_file()
    record = json.loads((found.adapter / "kuea.json").read_text())
    # Nothing was left to train.
    assert record["resumed_at"] == [5]
    assert record["steps"] == 5
    assert record["data"]["samples"] == 38
    weights = [load_file(run.adapter / "adapter_model.safetensors") for run in (whole, found)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_optimiser_that_needs_cuda_is_refused_before_the_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_run, "assemble", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(EnvironmentFailure, match=r"'optim\.optimizer' is paged_adamw.* CUDA only"):
        run_tuning(
            recipe_of(world, optim__optimizer="paged_adamw"), tmp_path / "out", progress=False
        )
    assert not list(tmp_path.iterdir())
