"""The trainings learn, repeat themselves, and treat packed questions like single ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPModel, LlamaTokenizer, LlavaForConditionalGeneration

from kuea_mllm.miniworld import train_clip, train_llava, train_teacher
from kuea_mllm.miniworld.models import make_clip, make_llava, make_llava_processor
from kuea_mllm.miniworld.packing import QuestionPacker
from kuea_mllm.miniworld.prompts import conversation
from kuea_mllm.miniworld.questions import sample_questions
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import sample_scenes
from kuea_mllm.miniworld.training import Schedule, seeded
from kuea_mllm.miniworld.vocabularies import build_clip_tokenizer, build_llava_tokenizer

SHORT = Schedule(steps=2, lr=1e-3, warmup_steps=1)


@pytest.fixture(scope="module")
def tokenizer() -> LlamaTokenizer:
    return build_llava_tokenizer()


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    with seeded(0):
        return make_clip(build_clip_tokenizer()).eval()


@pytest.fixture(scope="module")
def llava(clip: CLIPModel, tokenizer: LlamaTokenizer) -> LlavaForConditionalGeneration:
    with seeded(0):
        return make_llava(clip, tokenizer).eval()


def test_llava_reads_the_tower_of_its_clip(
    clip: CLIPModel, llava: LlavaForConditionalGeneration
) -> None:
    tower = llava.model.vision_tower.state_dict()
    for name, weight in clip.vision_model.state_dict().items():
        assert torch.equal(tower[name], weight)


def test_packed_questions_equal_single_conversations(
    llava: LlavaForConditionalGeneration, tokenizer: LlamaTokenizer
) -> None:
    rng = np.random.default_rng(0)
    scenes = sample_scenes(2, "train", seed=0)
    images = render_scenes(scenes, rng)
    questions = [sample_questions(scene, rng, 3 + row) for row, scene in enumerate(scenes)]
    packer = QuestionPacker(tokenizer)
    encoded = [[packer.encode(question) for question in row] for row in questions]
    batch = packer.pack(encoded)
    processor = make_llava_processor(tokenizer)
    image_id = llava.config.image_token_id
    with torch.inference_mode():
        tokens = llava.model.multi_modal_projector(train_llava.compute_features(llava, images))
        packed = llava.lm_head(train_llava.decode_packed(llava, tokens, batch))
        for row, image in enumerate(images):
            pixels = processor.image_processor(image, return_tensors="pt").pixel_values
            start = batch.image_start + 16
            for item in encoded[row]:
                prefix = batch.input_ids[row, : batch.image_start].tolist()
                ids = [*prefix, *[image_id] * 16, *item.prompt, *item.answer]
                single = llava(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
                size = len(item.prompt) + len(item.answer)
                torch.testing.assert_close(
                    packed[row, start : start + size], single[-size:], atol=2e-5, rtol=1e-4
                )
                start += size


def test_packed_targets_are_the_answers(tokenizer: LlamaTokenizer) -> None:
    rng = np.random.default_rng(0)
    scene = sample_scenes(1, "train", seed=3)[0]
    questions = sample_questions(scene, rng, 3)
    packer = QuestionPacker(tokenizer)
    batch = packer.pack([[packer.encode(question) for question in questions]])
    answers = "".join(f" {question.answer}</s>" for question in questions).strip()
    found = tokenizer.decode(batch.targets[batch.is_answer])
    assert found.replace(" ", "") == answers.replace(" ", "")


def test_processor_makes_one_placeholder_per_patch(tokenizer: LlamaTokenizer) -> None:
    processor = make_llava_processor(tokenizer)
    image = render_scenes(sample_scenes(1, "train", seed=0), np.random.default_rng(0))[0]
    inputs = processor(images=image, text=conversation("Is it?"), return_tensors="pt")
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    assert int((inputs.input_ids == placeholder).sum()) == 16
    assert inputs.pixel_values.shape == (1, 3, 32, 32)


def test_processors_and_training_agree_on_pixels(tokenizer: LlamaTokenizer) -> None:
    from kuea_mllm.miniworld.models import CLIP_MEAN, CLIP_STD
    from kuea_mllm.miniworld.training import normalise_pixels

    images = render_scenes(sample_scenes(3, "train", seed=0), np.random.default_rng(0))
    processed = make_llava_processor(tokenizer).image_processor(list(images), return_tensors="pt")
    expected = normalise_pixels(images, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(processed.pixel_values, expected, atol=1e-6, rtol=1e-5)


def test_clip_training_follows_the_seed() -> None:
    tokenizer = build_clip_tokenizer()
    state = torch.random.get_rng_state()
    models = [
        train_clip.train_clip(tokenizer, seed=seed, pairs=64, schedule=SHORT, progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [model.visual_projection.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_teacher_training_returns_a_backbone() -> None:
    teacher = train_teacher.train_teacher(pictures=64, schedule=SHORT, progress=False)
    assert teacher.config.num_register_tokens == 2
    assert teacher(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 19, 96)


def test_llava_training_leaves_the_tower_alone(
    clip: CLIPModel, tokenizer: LlamaTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_llava, "_ALIGNMENT", SHORT)
    llava = train_llava.train_llava(
        clip, tokenizer, seed=0, pictures=40, schedule=replace(SHORT, steps=3), progress=False
    )
    tower = llava.model.vision_tower.state_dict()
    for name, weight in clip.vision_model.state_dict().items():
        assert torch.equal(tower[name], weight)
