"""The shipped checkpoints load by plain `from_pretrained` and are what the code says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2WithRegistersModel,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from kuea_mllm.io import read_json
from kuea_mllm.miniworld import ASSETS, encoder_eval
from kuea_mllm.miniworld.build import load_teacher_tower
from kuea_mllm.miniworld.encoder_eval import evaluate_probes, score_encoder
from kuea_mllm.miniworld.llava_eval import score_llava
from kuea_mllm.miniworld.models import CLIP_MEAN
from kuea_mllm.miniworld.prompts import conversation
from kuea_mllm.miniworld.vocabularies import build_clip_tokenizer, build_llava_tokenizer


@pytest.fixture
def few_probe_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_eval, "_PROBE_TRAIN", 600)


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(ASSETS / "llava").eval()


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(ASSETS / "clip").eval()


def test_assets_are_small_and_hold_no_paths() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
    for path in files:
        if path.suffix == ".json":
            text = path.read_text(encoding="utf-8")
            assert "/tmp" not in text  # noqa: S108
            assert "/work" not in text
            assert json.loads(text).get("_name_or_path", "") == ""


def test_world_record_is_that_of_seed_zero() -> None:
    world = read_json(ASSETS / "world.json")
    assert world["seed"] == 0
    assert set(world["versions"]) == {"numpy", "torch", "transformers"}
    assert world["teacher"]["probe/digit"] > world["clip"]["probe/digit"] + 5


def test_tokenizers_are_those_the_code_builds() -> None:
    clip = AutoTokenizer.from_pretrained(ASSETS / "clip")
    assert clip.get_vocab() == build_clip_tokenizer().get_vocab()
    llava = AutoTokenizer.from_pretrained(ASSETS / "llava")
    assert llava.get_vocab() == build_llava_tokenizer().get_vocab()


def test_image_processors_load_as_their_classes() -> None:
    clip = AutoImageProcessor.from_pretrained(ASSETS / "clip", backend="pil")
    assert isinstance(clip, CLIPImageProcessorPil)
    assert tuple(clip.image_mean) == CLIP_MEAN
    teacher = AutoImageProcessor.from_pretrained(ASSETS / "teacher", backend="pil")
    assert teacher.crop_size["height"] == 32
    llava = AutoImageProcessor.from_pretrained(ASSETS / "llava", backend="pil")
    assert isinstance(llava, LlavaImageProcessorPil)
    assert llava.do_pad is True
    processor = LlavaProcessor.from_pretrained(ASSETS / "llava", backend="pil")
    assert isinstance(processor.image_processor, LlavaImageProcessorPil)
    assert processor.num_additional_image_tokens == 1
    assert processor.patch_size == 8


def test_towers_have_the_documented_shapes(clip: CLIPModel) -> None:
    vision = CLIPVisionModelWithProjection.from_pretrained(ASSETS / "clip").eval()
    pixels = torch.zeros(2, 3, 32, 32)
    with torch.inference_mode():
        output = vision(pixel_values=pixels, output_hidden_states=True)
        assert output.image_embeds.shape == (2, 64)
        assert output.hidden_states[-2].shape == (2, 17, 64)
        teacher = Dinov2WithRegistersModel.from_pretrained(ASSETS / "teacher").eval()
        assert teacher(pixel_values=pixels).last_hidden_state.shape == (2, 19, 96)
    assert clip.config.vision_config.hidden_act == "quick_gelu"


def test_llava_holds_the_tower_of_the_clip(
    clip: CLIPModel, llava: LlavaForConditionalGeneration
) -> None:
    tower = llava.model.vision_tower.state_dict()
    for name, weight in clip.vision_model.state_dict().items():
        assert torch.equal(tower[name], weight)
    assert llava.config.vision_feature_layer == -2
    assert llava.config.text_config.rms_norm_eps == 1e-5
    assert llava.generation_config.do_sample is False


def test_llava_generates_a_short_answer(llava: LlavaForConditionalGeneration) -> None:
    from PIL import Image

    processor = LlavaProcessor.from_pretrained(ASSETS / "llava", backend="pil")
    prompt = conversation(
        "How many digits are in the image?\nAnswer the question using a single word or phrase."
    )
    inputs = processor(images=Image.new("RGB", (32, 32)), text=prompt, return_tensors="pt")
    output = llava.generate(**inputs, max_new_tokens=4)
    answer = processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer in {"1", "2", "3", "4"}


def test_llava_answers_better_than_chance(llava: LlavaForConditionalGeneration) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "llava")
    scores = score_llava(llava, tokenizer, split="validation", pictures=60)
    assert scores["miniworld_pope"] > 55
    assert scores["miniworld_vqa"] > 60
    assert scores["miniworld_textvqa"] > 40
    assert scores["miniworld_refcoco"] > 60


@pytest.mark.usefixtures("few_probe_pictures")
def test_encoder_scores_are_repeatable_and_kept_per_picture(clip: CLIPModel) -> None:
    vision = CLIPVisionModelWithProjection.from_pretrained(ASSETS / "clip").eval()
    first = score_encoder(vision, ASSETS / "clip", split="validation", per_set=100)
    again = score_encoder(
        lambda pixels: vision(pixels).image_embeds, ASSETS / "clip", split="validation", per_set=100
    )
    assert first.metrics == again.metrics
    assert first.metrics["zero_shot/single"] > 40
    assert first.samples["zero_shot/single"].shape == (100,)
    for name, samples in first.samples.items():
        assert 100 * samples.mean() == pytest.approx(first.metrics[name], abs=1e-3)


@pytest.mark.usefixtures("few_probe_pictures")
def test_teacher_sees_more_than_the_clip() -> None:
    teacher = evaluate_probes(load_teacher_tower(ASSETS / "teacher"), per_set=200)
    vision = CLIPVisionModelWithProjection.from_pretrained(ASSETS / "clip").eval()
    clip = evaluate_probes(vision, per_set=200)
    assert teacher["probe/digit"] > clip["probe/digit"]
    assert teacher["probe/colours"] > clip["probe/colours"]
