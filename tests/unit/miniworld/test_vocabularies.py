"""Both tokenizers survive their files and every text."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer, CLIPTokenizer, LlamaTokenizer

from kuea_mllm.miniworld.captions import caption_scene
from kuea_mllm.miniworld.prompts import after_image, before_image, conversation
from kuea_mllm.miniworld.questions import sample_questions
from kuea_mllm.miniworld.scenes import sample_scenes
from kuea_mllm.miniworld.vocabularies import (
    PAD_TOKEN,
    build_clip_tokenizer,
    build_llava_tokenizer,
)

SCENES = sample_scenes(60, "train", seed=5)


@pytest.fixture(scope="module")
def llava_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LlamaTokenizer:
    folder = tmp_path_factory.mktemp("llava")
    build_llava_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("clip")
    build_clip_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_clip_tokenizer_has_one_token_per_word(clip_tokenizer: CLIPTokenizer) -> None:
    assert isinstance(clip_tokenizer, CLIPTokenizer)
    rng = np.random.default_rng(0)
    for scene in SCENES:
        caption = caption_scene(scene, rng)
        words = caption.replace(",", " ,").split()
        tokens = clip_tokenizer(caption).input_ids
        assert len(tokens) == len(words) + 2 <= 32
        assert clip_tokenizer.decode(tokens[1:-1]) == " ".join(words)


def test_llava_tokenizer_is_a_llama_with_image_and_padding(
    llava_tokenizer: LlamaTokenizer,
) -> None:
    assert isinstance(llava_tokenizer, LlamaTokenizer)
    assert llava_tokenizer.pad_token == PAD_TOKEN
    assert llava_tokenizer.bos_token_id == 1
    assert llava_tokenizer.eos_token_id == 2
    image = llava_tokenizer.convert_tokens_to_ids("<image>")
    assert llava_tokenizer.encode("<image>", add_special_tokens=False) == [image]


def test_llava_conversations_survive_the_round_trip(llava_tokenizer: LlamaTokenizer) -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES:
        for question in sample_questions(scene, rng, 4):
            text = conversation(question.prompt, question.answer)
            tokens = llava_tokenizer(text).input_ids
            assert tokens[0] == llava_tokenizer.bos_token_id
            assert tokens[-1] == llava_tokenizer.eos_token_id
            assert len(tokens) <= 30
            assert llava_tokenizer.decode(tokens[1:]) == text


@pytest.mark.parametrize("text", ["Grüße, 世界!", "0.37 and 12:45\tx\n\n", "print('{}')"])
def test_any_text_survives_the_llava_tokenizer(llava_tokenizer: LlamaTokenizer, text: str) -> None:
    tokens = llava_tokenizer.encode(text, add_special_tokens=False)
    assert llava_tokenizer.unk_token_id not in tokens
    assert llava_tokenizer.decode(tokens) == text


def test_pieces_around_the_image_are_short(llava_tokenizer: LlamaTokenizer) -> None:
    assert len(llava_tokenizer.encode(before_image())) == 4
    question = "Is there a red seven in the image?"
    assert len(llava_tokenizer.encode(after_image(question), add_special_tokens=False)) <= 10


def test_tokenizers_are_the_same_in_every_build() -> None:
    first, second = build_llava_tokenizer(), build_llava_tokenizer()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    clips = build_clip_tokenizer(), build_clip_tokenizer()
    assert clips[0].backend_tokenizer.to_str() == clips[1].backend_tokenizer.to_str()
