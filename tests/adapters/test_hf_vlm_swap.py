"""Swapping into many VLM classes: on files, in memory and by hand give the same model."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_vlm_samples import CONFIGS, SHARED, make_model, to_older_layout, write_directory
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from kuea_mllm.adapters.hf_vlm.adapter import HFVLMAdapter
from kuea_mllm.errors import TowerMismatch
from kuea_mllm.swapping import swap_tower, swap_tower_files, tower_fingerprint_of
from kuea_mllm.swapping.sources import tower_of_mllm
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower

ADAPTER = HFVLMAdapter()
# Their text models decide about tied embeddings, not the option of the whole model.
OWN_TYING = {"ModernVBertForMaskedLM", "UltraVBertForMaskedLM", "T5Gemma2ForConditionalGeneration"}


@functools.cache
def make_tower(family: str, width: int) -> Tower:
    sizes = {**SHARED, "hidden_size": width}
    torch.manual_seed(7)
    model: Any
    if family == "clip":
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=8))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**sizes))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_tower(folder)


def load(name: str, directory: Path) -> Any:
    """Load plainly, and make sure that nothing was missing, left over or re-drawn."""
    loader: Any = getattr(transformers, name)
    model, report = loader.from_pretrained(directory, output_loading_info=True)
    problems = {kind: found for kind, found in report.items() if found}
    assert not problems
    return model.eval()


def tower_module(model: Any) -> Any:
    # Spelled out on purpose, not through the adapter.
    inner = getattr(model.model, "encoder", model.model)
    for attribute in ("vision_model", "image_tower", "vision_tower"):
        if hasattr(inner, attribute):
            return getattr(inner, attribute)
    raise AssertionError


def tensors(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        state |= load_file(file)
    return state


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("form", ["today, one file, untied", "older, shards, tied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_memory_and_by_hand_agree(name: str, form: str, tmp_path: Path) -> None:
    is_older = form.startswith("older")
    model = make_model(name, tie_word_embeddings=is_older)
    options = {"max_shard_size": "20KB"} if is_older else {}
    base = write_directory(model, tmp_path / "base", **options)
    if is_older:
        to_older_layout(base)
        assert len(list(base.glob("*.safetensors"))) > 3
    slot = ADAPTER.tower_slot(base)
    tower = make_tower(slot.family, slot.vision_config["hidden_size"])
    before = tensors(base)
    if name not in OWN_TYING:
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.weight is words.weight) == is_older
        assert any("lm_head" in key for key in before) != is_older

    receipt = swap_tower_files(base, tower, tmp_path / "out", adapter=ADAPTER)
    assert receipt.fingerprint_after == tower_fingerprint_of(tmp_path / "out", ADAPTER)
    assert receipt.fingerprint_after == tower.fingerprint
    assert_equal(before, tensors(base))
    from_files = load(name, tmp_path / "out").state_dict()

    in_memory = load(name, base)
    swap_tower(in_memory, tower, ADAPTER)
    assert_equal(in_memory.state_dict(), from_files)

    by_hand = load(name, base)
    module = tower_module(by_hand)
    state = tower.canonical_state()
    module.load_state_dict({key: state[key] for key in module.state_dict()})
    assert_equal(by_hand.state_dict(), from_files)
    by_hand.save_pretrained(tmp_path / "by_hand")
    assert_equal(load(name, tmp_path / "by_hand").state_dict(), from_files)
    if not is_older:
        assert_equal(tensors(tmp_path / "by_hand"), tensors(tmp_path / "out"))

    changed = {
        key for key, tensor in tensors(tmp_path / "out").items() if not before[key].equal(tensor)
    }
    assert changed
    assert all(key.startswith(receipt.key_prefix) for key in changed)
    ending = slot.module.rpartition(".")[2] + (".vision_model." if is_older else ".")
    assert receipt.key_prefix.endswith(ending)


def test_the_video_tower_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_directory(make_model("VideoLlavaForConditionalGeneration"), tmp_path / "base")
    with caplog.at_level("INFO", logger="kuea_mllm"):
        swap_tower_files(base, make_tower("clip", 16), tmp_path / "out", adapter=ADAPTER)
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"image_tower"}
    assert "model.image_tower is taken, which VideoLlavaModel uses for images" in caplog.text


def test_swapping_back_gives_the_base_again(tmp_path: Path) -> None:
    base = write_directory(make_model("Gemma3ForConditionalGeneration"), tmp_path / "base")
    swap_tower_files(base, make_tower("siglip", 16), tmp_path / "there", adapter=ADAPTER)
    # Its tower has no pooling head, as in most VLMs with SigLIP.
    swap_tower_files(
        tmp_path / "there", tower_of_mllm(base, ADAPTER), tmp_path / "back", adapter=ADAPTER
    )
    assert_equal(tensors(base), tensors(tmp_path / "back"))


def test_tower_of_the_other_family_is_refused(tmp_path: Path) -> None:
    base = write_directory(make_model("PaliGemmaForConditionalGeneration"), tmp_path / "base")
    with pytest.raises(TowerMismatch, match="family"):
        swap_tower_files(base, make_tower("clip", 16), tmp_path / "out", adapter=ADAPTER)


def test_weights_that_are_not_those_of_the_configuration_are_refused(tmp_path: Path) -> None:
    base = write_directory(make_model("LlavaNextForConditionalGeneration"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(TowerMismatch, match=r"encoder\.layers\.2\.\S+ is no part of such a tower"):
        swap_tower_files(base, make_tower("clip", 16), tmp_path / "out", adapter=ADAPTER)
