"""What the generic adapter takes for its own, and what it refuses with a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_vlm_samples import CONFIGS, SHARED, clip, make_model, siglip, write_directory
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPVisionModel,
    ColPaliConfig,
    Idefics3VisionConfig,
    SiglipVisionModel,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.adapters.conformance import problems_of
from kuea_mllm.adapters.hf_vlm.adapter import HFVLMAdapter
from kuea_mllm.adapters.hf_vlm.structure import find_tower
from kuea_mllm.errors import TowerMismatch, UserError
from kuea_mllm.model_files import TensorEntry
from kuea_mllm.towers.formats.locate import expected_shapes, locate_tensors

ADAPTER = HFVLMAdapter()


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_vlms_are_recognised_by_their_configuration(name: str) -> None:
    assert ADAPTER.recognises(CONFIGS[name]().to_dict())


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model_type": "bert"},
        {"model_type": "llava_qwen", "auto_map": {"AutoModel": "modeling.Model"}},
        {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        clip().to_dict(),
        siglip().to_dict(),
        CLIPConfig().to_dict(),
    ],
    ids=lambda content: str(content.get("model_type", "empty")),
)
def test_other_models_are_not_recognised(content: dict[str, Any]) -> None:
    assert not ADAPTER.recognises(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "smolvlm"}, "its vision model is a SmolVLMVisionTransformer"),
        ({"model_type": "idefics2"}, "its vision model is a Idefics2VisionTransformer"),
        ({"model_type": "kosmos-2"}, "its vision model is a Kosmos2VisionModel"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "PixtralVisionModel"),
        ({"model_type": "llava_qwen"}, "of model_type 'llava_qwen', which transformers"),
        ({"model_type": "llava", "vision_feature_layer": "last"}, "not a valid llava config"),
        ({"model_type": "aya_vision"}, "cannot build the AyaVisionForConditionalGeneration"),
        ({"model_type": "llava", "mm_vision_tower": "x"}, r"original layout .*mm_vision_tower 'x'"),
        # Code of its own, another model's class, no model at all.
        ({"model_type": "llava", "architectures": ["MyVLM"]}, "names the model classes MyVLM, whi"),
        (
            {"model_type": "llava_next", "architectures": ["LlavaForConditionalGeneration"]},
            "LlavaForConditionalGeneration, which is not of its model_type 'llava_next'",
        ),
        ({"model_type": "llava", "architectures": ["Trainer"]}, "names the model classes Trainer,"),
    ],
    ids=lambda value: str(value.get("model_type")) if isinstance(value, dict) else "",
)
def test_refusal_names_what_is_wrong(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    base = write_config(tmp_path, content)
    for refused in (ADAPTER.check_base, ADAPTER.tower_slot):
        with pytest.raises(UserError, match=words):
            refused(base)


@torch.no_grad()
def test_copies_of_siglip_may_compute_something_else() -> None:
    """Why only the classes themselves are taken: Idefics rounds positions, which collide at 19."""
    equal = {}
    for grid in (4, 19):
        torch.manual_seed(0)
        sizes = {**SHARED, "image_size": 4 * grid, "hidden_act": "gelu_pytorch_tanh"}
        original = SiglipVisionModel(siglip(**sizes, vision_use_head=False)).eval()
        copy = Idefics3VisionTransformer(Idefics3VisionConfig(**sizes)).eval()
        copy.load_state_dict(original.state_dict())
        pixels = torch.randn(1, 3, 4 * grid, 4 * grid)
        outputs = [model(pixels).last_hidden_state for model in (original, copy)]
        equal[grid] = bool((outputs[0] - outputs[1]).abs().max() < 1e-4)
    assert equal == {4: True, 19: False}


def test_wrapper_of_a_known_class_reads_the_same(tmp_path: Path) -> None:
    inner = CONFIGS["PaliGemmaForConditionalGeneration"]()
    known = ADAPTER.tower_slot(write_config(tmp_path / "one", inner.to_dict()))
    outer = ColPaliConfig(vlm_config=inner, embedding_dim=8).to_dict()
    outer["architectures"] = ["ColPaliForRetrieval"]
    slot = ADAPTER.tower_slot(write_config(tmp_path / "two", outer))
    assert slot.module == "vlm.vision_tower"
    assert (slot.tap, slot.family) == (known.tap, known.family)


class OwnModel(nn.Module):
    """A model from elsewhere that holds a tower of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = CLIPVisionModel(clip())


class VideoLlavaModel(nn.Module):
    """A namesake of a known class that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower, self.video_tower = CLIPVisionModel(clip()), CLIPVisionModel(clip())


class DerivedTower(CLIPVisionModel):
    """Same names and shapes, but who knows what it computes."""


def test_towers_are_found_by_class() -> None:
    found = find_tower(OwnModel(), "it")
    assert (found.path, found.family) == ("eye", "clip")
    assert ADAPTER.vision_module(OwnModel()).config.hidden_size == 16
    derived = nn.ModuleDict({"vision_tower": DerivedTower(clip())})
    with pytest.raises(UserError, match=r"a loaded ModuleDict has no vision tower .* DerivedTower"):
        ADAPTER.vision_module(derived)
    with pytest.raises(UserError, match=r"several vision towers \(image_tower, video_tower\)"):
        find_tower(VideoLlavaModel(), "it")
    with pytest.raises(UserError, match="Linear has no vision tower"):
        ADAPTER.vision_module(nn.Linear(1, 1))


def test_unknown_reader_has_no_tap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kuea_mllm.adapters.hf_vlm import readers

    config = CONFIGS["LlavaNextForConditionalGeneration"](image_seq_length=17).to_dict()
    monkeypatch.delitem(readers.READERS, "LlavaNextModel")
    slot = ADAPTER.tower_slot(write_config(tmp_path, config))
    assert (slot.tap, slot.projector_width) == (None, None)
    assert slot.module == "model.vision_tower"


def test_base_that_cannot_answer_conforms_in_everything_else(tmp_path: Path) -> None:
    # Its stand-ins for tokenizer and processor cannot be loaded.
    base = write_directory(make_model("PaliGemmaForConditionalGeneration"), tmp_path / "base")
    assert problems_of(ADAPTER, base, answers=False) == []


def test_tensors_of_the_configuration_are_those_of_the_model() -> None:
    for name in ("LlavaNextForConditionalGeneration", "AyaVisionForConditionalGeneration"):
        found = find_tower(make_model(name), name)
        shapes = {key: tuple(value.shape) for key, value in found.module.state_dict().items()}
        assert expected_shapes(found.family, found.module.config.to_dict()) == shapes


def entries(*prefixes: str, extra: str = "") -> dict[str, TensorEntry]:
    names = [prefix + name for prefix in prefixes for name in SHAPES]
    shapes = {
        name: SHAPES[name[len(p) :]] for p in prefixes for name in names if name.startswith(p)
    }
    if extra:
        shapes[extra] = (1,)
    return {name: TensorEntry(name, "f", "F32", shape, 0, 0) for name, shape in shapes.items()}


SHAPES = expected_shapes("clip", clip().to_dict())


@pytest.mark.parametrize(
    ("prefixes", "module", "expected"),
    [
        (["a.tower.", "b.tower."], "model.b.tower", "b.tower."),
        (
            ["image_tower.vision_model.", "video_tower.vision_model."],
            "m.image_tower",
            "image_tower.vision_model.",
        ),
        (["model.vision_model.", "model.other."], "model.vision_model", "model.vision_model."),
        (["anything.at.all."], "model.vision_tower", "anything.at.all."),
    ],
)
def test_path_decides_between_towers_of_one_shape(
    prefixes: list[str], module: str, expected: str
) -> None:
    found, tensors = locate_tensors(entries(*prefixes), SHAPES, module=module, where="it")
    assert found == expected
    assert tensors.keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (entries("a.", "b."), r"several towers of that shape \(a\., b\.\), and none is at tower"),
        (
            entries("a.", extra="a.encoder.layers.9.mlp.fc1.bias"),
            "layers.9.mlp.fc1.bias is no part",
        ),
        (
            entries("a.", extra="a.encoder.layers.0.mlp.fc1.lora_A.weight"),
            "lora_A.weight is no part",
        ),
        (entries("", extra="encoder.layers.9.mlp.fc1.bias"), "below the top: encoder.layers.9"),
        ({}, "no tensor is named"),
    ],
)
def test_towers_that_are_not_the_one_are_refused(found: dict[str, TensorEntry], words: str) -> None:
    with pytest.raises(TowerMismatch, match=words):
        locate_tensors(found, SHAPES, module="tower", where="it")


def test_what_lies_beside_a_tower_at_the_top_is_no_part_of_it() -> None:
    found = entries("", extra="language_model.lm_head.weight")
    assert locate_tensors(found, SHAPES, module="vision_tower", where="it")[0] == ""


def test_every_class_of_the_table_exists() -> None:
    from kuea_mllm.adapters.hf_vlm.readers import READERS

    assert [name for name in READERS if not hasattr(transformers, name)] == []


def test_slot_is_the_same_with_and_without_weights(tmp_path: Path) -> None:
    model = make_model("LlavaNextForConditionalGeneration")
    with_weights = ADAPTER.tower_slot(write_directory(model, tmp_path / "base"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    without = ADAPTER.tower_slot(write_config(tmp_path / "config", config))
    assert isinstance(without, TowerSlot)
    assert (without.vision_config, without.tap) == (with_weights.vision_config, with_weights.tap)
    assert (without.projector_width, with_weights.projector_width) == (None, 16)
