"""The swap core on a tiny OpenFlamingo directory: the same proofs as for LLaVA."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_flamingo import save_tiny_base, tiny_batch, tiny_config
from transformers import CLIPVisionModel

from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
from kuea_mllm.errors import TowerMismatch
from kuea_mllm.swapping import (
    inspect_fit,
    load_any_tower,
    swap_tower,
    swap_tower_files,
    tower_fingerprint_of,
    verify_model,
)
from kuea_mllm.towers.model.fingerprint import fingerprint_state
from kuea_mllm.towers.reading.load import Tower, load_tower

ADAPTER = OpenFlamingoAdapter()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("flamingo") / "base")


def other_tower(directory: Path, **changes: Any) -> Tower:
    torch.manual_seed(5)
    config: Any = tiny_config().vision_config
    CLIPVisionModel(type(config)(**(config.to_dict() | changes))).save_pretrained(directory)
    return load_tower(directory)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    loader: Any = OpenFlamingoForConditionalGeneration
    model, report = loader.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    given = tiny_batch()
    image = model.config.image_token_id
    given["input_ids"] = given["input_ids"].masked_fill(
        given["input_ids"] == tiny_config().image_token_id, image
    )
    given["pixel_values"] = given["pixel_values"].to(model.dtype)
    output: torch.Tensor = model(**given).logits[given["attention_mask"]].float()
    return output


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_memory_and_by_hand_agree(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tower = other_tower(tmp_path / "tower")
    before = hashes(base)
    receipt = swap_tower_files(base, tower, tmp_path / "out", adapter=ADAPTER)
    assert hashes(base) == before
    assert receipt.key_prefix == "model.vision_tower."
    in_memory, by_hand = load(base, dtype), load(base, dtype)
    original = logits(by_hand)
    by_hand.model.vision_tower.load_state_dict(
        {name: t for name, t in tower.canonical_state().items() if "projection" not in name}
    )
    expected = logits(by_hand)
    assert (expected - original).abs().max() > 1e-2
    memory_receipt = swap_tower(in_memory, tower, ADAPTER)
    assert torch.equal(logits(load(tmp_path / "out", dtype)), expected)
    assert torch.equal(logits(in_memory), expected)
    if dtype is torch.float32:
        assert memory_receipt.fingerprint_before == receipt.fingerprint_before
        assert memory_receipt.fingerprint_after == receipt.fingerprint_after == tower.fingerprint


def test_swapping_the_original_back_restores_every_weight(base: Path, tmp_path: Path) -> None:
    tower = other_tower(tmp_path / "tower")
    first = swap_tower_files(base, tower, tmp_path / "one", adapter=ADAPTER)
    second = swap_tower_files(
        tmp_path / "one", load_any_tower(base), tmp_path / "two", adapter=ADAPTER
    )
    assert second.fingerprint_after == first.fingerprint_before
    restored = hashes(tmp_path / "two")
    history = json.loads((tmp_path / "two" / "kuea.json").read_text())["history"]
    assert [entry["replaced"]["fingerprint_after"] for entry in history] == [
        first.fingerprint_after
    ]
    del restored["kuea.json"], restored["README.md"]
    assert restored == hashes(base)


def test_result_proves_which_tower_it_holds(base: Path, tmp_path: Path) -> None:
    tower = other_tower(tmp_path / "tower")
    swap_tower_files(base, tower, tmp_path / "out", adapter=ADAPTER)
    found = verify_model(tmp_path / "out", tower=tower)
    assert found.is_good
    assert found.adapter == "openflamingo"
    assert not verify_model(tmp_path / "out", tower=load_any_tower(base)).is_good
    runtime = ADAPTER.open_runtime(tmp_path / "out", dtype="float32", device="cpu")
    assert fingerprint_state(runtime.vision_state()) == tower.fingerprint


def test_drift_is_measured_at_the_tokens_that_flamingo_reads(base: Path, tmp_path: Path) -> None:
    """The last block before the final norm: the norm itself may change and nothing moves."""
    tower = other_tower(tmp_path / "tower")
    model = load(base)
    norm = model.model.vision_tower.post_layernorm
    with torch.no_grad():
        norm.weight.mul_(3)
    model.model.vision_tower.save_pretrained(tmp_path / "norm")
    only_norm = inspect_fit(base, load_tower(tmp_path / "norm"), ADAPTER)
    assert only_norm.drift is not None
    assert only_norm.drift.tap_relative == 0
    moved = inspect_fit(base, tower, ADAPTER)
    assert moved.drift is not None
    assert moved.drift.tap_relative > 0.1


@torch.no_grad()
def test_only_the_tower_changes_and_the_model_uses_it(base: Path, tmp_path: Path) -> None:
    tower = other_tower(tmp_path / "tower")
    out = tmp_path / "swapped"
    swap_tower_files(base, tower, out, adapter=ADAPTER)
    assert tower_fingerprint_of(out, ADAPTER) == tower.fingerprint
    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.vision_tower.") for name in changed)
    assert after.keys() == before.keys()

    models: list[Any] = [
        OpenFlamingoForConditionalGeneration.from_pretrained(path).eval() for path in (base, out)
    ]
    assert fingerprint_state(ADAPTER.vision_module(models[1]).state_dict()) == tower.fingerprint
    given = tiny_batch()
    given["input_ids"] = given["input_ids"].masked_fill(
        given["input_ids"] == tiny_config().image_token_id, models[0].config.image_token_id
    )
    first, second = (model(**given).logits for model in models)
    # The last row holds no image: its text alone must not change.
    text = given["attention_mask"][2]
    assert torch.equal(first[2][text], second[2][text])
    assert float((first[0] - second[0]).abs().max()) > 1e-3


def test_a_tower_of_another_width_is_refused(base: Path, tmp_path: Path) -> None:
    wide = other_tower(tmp_path / "tower", hidden_size=64, num_attention_heads=4)
    with pytest.raises(TowerMismatch, match="64"):
        swap_tower_files(base, wide, tmp_path / "swapped", adapter=ADAPTER)
    assert not (tmp_path / "swapped").exists()
