from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from kuea_mllm.adapters.base import Tap
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava.prompt import build_prompt
from kuea_mllm.errors import TowerMismatch, UserError

ORIGINAL = [
    {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
    {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
]


def test_slot_has_defaults_filled_in(tiny_llava: Path) -> None:
    slot = LlavaAdapter().tower_slot(tiny_llava)
    assert slot.vision_config["hidden_act"] == "quick_gelu"
    assert slot.vision_config["layer_norm_eps"] == 1e-5
    assert (slot.tap, slot.family) == (Tap((-2,), drops_cls=True), "clip")
    assert slot.mean is not None
    assert slot.std is not None


def test_several_layers_are_told(tmp_path: Path) -> None:
    content = {"model_type": "llava", "vision_feature_layer": [-2, -5]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    slot = LlavaAdapter().tower_slot(tmp_path)
    assert (slot.tap, slot.projector_width) == (Tap((-2, -5), drops_cls=True), None)


def test_projector_width_is_read_off_its_weights(
    tiny_llava: Path, variant: Callable[..., Path]
) -> None:
    assert LlavaAdapter().tower_slot(tiny_llava).projector_width == 32
    joined = variant(vision_feature_layer=[-2, 1])
    assert LlavaAdapter().tower_slot(joined).projector_width == 16
    (joined / "config.json").write_text(
        json.dumps(
            json.loads((joined / "config.json").read_text()) | {"vision_feature_layer": [0, 1, 2]}
        )
    )
    with pytest.raises(TowerMismatch, match=r"takes 32 values .* not 3 joined tokens"):
        LlavaAdapter().tower_slot(joined)


def test_slot_of_a_bare_configuration_is_that_of_llava_336(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    vision = LlavaAdapter().tower_slot(tmp_path).vision_config
    assert (vision["hidden_size"], vision["num_hidden_layers"], vision["image_size"]) == (
        1024,
        24,
        336,
    )


@pytest.mark.parametrize("config", ORIGINAL)
def test_original_layout_is_recognised_and_not_run(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter = LlavaAdapter()
    assert adapter.recognises(config)
    with pytest.raises(UserError, match=r"original layout.*mm_vision_tower"):
        adapter.open_runtime(tmp_path, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llava_next"}, "llava_next"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"model_type": "llava", "vision_feature_layer": "last"}, "not a valid LLaVA"),
        ({"model_type": "llava", "architectures": ["LlavaQwen"]}, "the model class LlavaQwen"),
    ],
)
def test_other_configurations_are_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        LlavaAdapter().tower_slot(tmp_path)


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"]
)
def test_incomplete_base_is_refused(variant: Callable[..., Path], missing: str) -> None:
    base = variant()
    (base / missing).unlink()
    with pytest.raises(UserError, match=Path(missing).stem):
        LlavaAdapter().check_base(base)


def test_missing_shard_is_named(variant: Callable[..., Path]) -> None:
    base = variant(shards=3)
    LlavaAdapter().check_base(base)
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003"):
        LlavaAdapter().check_base(base)


def test_pickle_weights_are_refused(variant: Callable[..., Path]) -> None:
    base = variant()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle files \(pytorch_model\.bin\)"):
        LlavaAdapter().check_base(base)


def test_processor_settings_of_transformers_5_are_read(variant: Callable[..., Path]) -> None:
    base = variant()
    settings = json.loads((base / "preprocessor_config.json").read_text())
    (base / "preprocessor_config.json").unlink()
    nested = {"image_processor": settings | {"image_mean": [0.1, 0.2, 0.3]}, "patch_size": 4}
    (base / "processor_config.json").write_text(json.dumps(nested))
    LlavaAdapter().check_base(base)
    assert LlavaAdapter().tower_slot(base).mean == (0.1, 0.2, 0.3)


def test_foreign_module_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no vision_tower"):
        LlavaAdapter().vision_module(nn.Linear(1, 1))


def test_prompt_follows_version_1() -> None:
    prompt = build_prompt("What is it?", image_count=1)
    assert prompt.startswith("A chat between a curious user")
    assert prompt.endswith(" USER: <image>\nWhat is it? ASSISTANT:")
    assert build_prompt("Hi", image_count=0).endswith("questions. USER: Hi ASSISTANT:")
    assert build_prompt("A <image> b", image_count=2).endswith(
        "USER: <image> <image>\nA  b ASSISTANT:"
    )
    assert build_prompt("", image_count=1).endswith("USER: <image> ASSISTANT:")
