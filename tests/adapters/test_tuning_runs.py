"""The same trainer tunes models of every adapter: `kuea-mllm lora`, from data to merged model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hf_vlm_tuner import TEMPLATE, set_template, write_llava

sys.path.insert(0, str(Path(__file__).parent / "openflamingo"))
sys.path.insert(0, str(Path(__file__).parents[1] / "invariance"))
from tiny_flamingo import save_tiny_base
from tuning_world import make_world, recipe_of

from kuea_mllm.adapters.registry import adapter_for
from kuea_mllm.swapping.verify import verify_model
from kuea_mllm.tuning.run import run_tuning


def flamingo(out: Path) -> Path:
    return save_tiny_base(out)


def other_vlm(out: Path) -> Path:
    return set_template(write_llava(out), TEMPLATE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    make_world(folder)
    return folder


@pytest.mark.parametrize(
    ("write", "adapter", "length"),
    [(flamingo, "openflamingo", 256), (other_vlm, "hf_vlm", 512)],
)
def test_models_of_other_adapters_are_tuned_and_merged(
    world: Path, tmp_path: Path, write: Callable[[Path], Path], adapter: str, length: int
) -> None:
    base = write(tmp_path / "base")
    recipe = recipe_of(
        world,
        model__path=str(base),
        model__adapter=adapter,
        data__max_length=length,
        optim__lr=1e-2,
        optim__epochs=3,
        lora__projector="freeze",
    )
    found = run_tuning(recipe, tmp_path / "run", merge=True, progress=False)
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert found.data["unlabelled_samples"] == 0
    weights = load_file(found.adapter / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert not any("vision" in name or "resampler" in name for name in weights)
    assert found.merged is not None
    assert adapter_for(found.merged).name == adapter_for(base).name
    assert not verify_model(found.merged).problems
    before, after = (_state(directory) for directory in (base, found.merged))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() == after.keys()
    # As many as took LoRA, and no other.
    assert len(changed) == len(weights) // 2


def _state(directory: Path) -> dict[str, Any]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
