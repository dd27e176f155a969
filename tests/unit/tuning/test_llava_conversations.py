"""The traps of LLaVA-1.5's training samples, each on its own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from mixture_samples import record, turns
from transformers import AutoTokenizer

from kuea_mllm.adapters.llava.original_tokenizer import write_tokenizer
from kuea_mllm.adapters.llava.prompt import SYSTEM
from kuea_mllm.adapters.llava.tuning import (
    IGNORED,
    IMAGE_PLACEHOLDER,
    LlavaConversations,
    build_conversation,
)
from kuea_mllm.errors import DataError, UserError
from kuea_mllm.miniworld import ASSETS

GOLDEN = Path(__file__).parents[2] / "golden" / "llava"
MODES = ["legacy", "nonlegacy"]


def original(mode: str) -> Any:
    return AutoTokenizer.from_pretrained(GOLDEN / f"tokenizer_{mode}")


@pytest.fixture(params=[*MODES, "mini world"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "mini world":
        return AutoTokenizer.from_pretrained(ASSETS / "llava")
    return original(request.param)


@pytest.fixture
def encoder(tokenizer: Any) -> LlavaConversations:
    return LlavaConversations(tokenizer, max_length=2048)


def sample(*values: str, image: str | None = None, first: str = "human") -> dict[str, Any]:
    return record(image=image, conversations=turns(*values, first=first))


def learned(encoder: LlavaConversations, made: dict[str, Any]) -> str:
    return str(encoder.tokenizer.decode([t for t in encoder.encode(made).labels if t != IGNORED]))


def test_answers_and_their_ends_are_learned_and_nothing_else(encoder: LlavaConversations) -> None:
    made = sample("<image>\nWhat is it?", "A cat.", "And that?", "A dog.", image="a.jpg")
    ids, labels, warning, left_out = encoder.encode(made)
    assert (warning, left_out) == ("", 0)
    assert learned(encoder, made).replace(" ", "") == "Acat.</s>Adog.</s>"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert ids.count(IMAGE_PLACEHOLDER) == 1


def test_tag_moves_to_the_front_of_its_turn() -> None:
    expected = f"{SYSTEM} USER: <image>\nWho wrote  this? ASSISTANT: I.</s>"
    for value in (
        "<image>\nWho wrote  this?",
        "Who wrote <image> this? ",
        "Who wrote  this?<image>",
    ):
        assert build_conversation(sample(value, "I.", image="a.jpg")) == expected
    twice = build_conversation(sample("<image>Who? <image>", "I.", image="a.jpg"))
    assert twice.count("<image>") == 1
    alone = build_conversation(sample("<image>", "I.", image="a.jpg"))
    assert alone == f"{SYSTEM} USER: <image> ASSISTANT: I.</s>"


def test_text_alone_keeps_its_tags_and_spaces() -> None:
    assert " USER:  a <image>  ASSISTANT: b" in build_conversation(sample(" a <image> ", "b"))


def test_answer_before_the_first_question_is_dropped(encoder: LlavaConversations) -> None:
    with_answer = sample("Hello!", "Who?", "Me.", first="gpt")
    assert encoder.encode(with_answer) == encoder.encode(sample("Who?", "Me."))


@pytest.mark.parametrize(
    "made",
    [
        sample("What?", ""),
        sample("What?", "A.", "", "B."),
        sample("It reads ASSISTANT: hello", "So."),
        sample("What?", "A.</s>B."),
        sample("What?", "A.", "And?"),
        sample("What?", "It <unk> is."),
    ],
    ids=["empty answer", "empty question", "role words", "end of turn", "no answer", "unknown"],
)
def test_miscounted_sample_loses_all_labels_and_says_so(
    encoder: LlavaConversations, made: dict[str, Any]
) -> None:
    found = encoder.encode(made)
    assert set(found.labels) == {IGNORED}
    assert found.warning.startswith("WARNING: tokenization mismatch: ")
    assert not encoder.encode(sample("What?", "A.", "And?", "B.")).warning


def test_text_is_cut_and_a_sample_with_an_image_is_not(tokenizer: Any) -> None:
    values = ("What is it? " * 4, "A cat. " * 40)
    whole = LlavaConversations(tokenizer, max_length=2048)
    short = LlavaConversations(tokenizer, max_length=60)
    text = short.encode(sample(*values))
    full = whole.encode(sample(*values))
    assert text.input_ids == full.input_ids[:60]
    assert text.labels == full.labels[:60]
    assert text.left_out == len(full.input_ids) - 60 > 0
    assert not text.warning
    pictured = sample(f"<image>{values[0]}", values[1], image="a.jpg")
    assert short.encode(pictured) == whole.encode(pictured)
    assert short.encode(pictured).left_out == 0


@pytest.mark.parametrize("mode", MODES)
def test_added_tokens_in_a_text_are_words_as_for_the_original(mode: str, tmp_path: Path) -> None:
    """A converted tokenizer knows `<image>` and `<pad>`; a text with them has no image."""
    (tmp_path / "out").mkdir()
    write_tokenizer(GOLDEN / f"tokenizer_{mode}", tmp_path / "out")
    converted = LlavaConversations(AutoTokenizer.from_pretrained(tmp_path / "out"), max_length=2048)
    before = LlavaConversations(original(mode), max_length=2048)
    for made in (
        sample("What does <image> mean in HTML?", "It is <image> or <img>.", "And <pad>?", "None."),
        sample("<image>Is <pad> a word?", "No.", image="a.jpg"),
    ):
        assert converted.encode(made) == before.encode(made)
        assert converted.tokenizer.pad_token_id not in converted.encode(made).input_ids
    again = pickle.loads(pickle.dumps(converted))
    assert again.encode(made) == before.encode(made)


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_the_unknown_token_where_there_is_no_other(mode: str) -> None:
    tokenizer = original(mode)
    assert tokenizer.pad_token_id is None
    assert LlavaConversations(tokenizer, max_length=9).pad_token_id == tokenizer.unk_token_id


def test_tokenizer_without_any_token_to_pad_with_is_refused() -> None:
    tokenizer = original("legacy")
    tokenizer.unk_token = None
    with pytest.raises(UserError, match="neither a padding token nor an unknown"):
        LlavaConversations(tokenizer, max_length=9, where="some/model")


def test_tokenizer_of_another_format_is_refused() -> None:
    tokenizer = original("legacy")
    tokenizer.eos_token = "<|im_end|>"  # noqa: S105 - a token of text
    with pytest.raises(UserError, match="another conversation format"):
        LlavaConversations(tokenizer, max_length=9)


def test_two_questions_in_a_row_are_refused() -> None:
    made = record(image=None, conversations=turns("a") + turns("b"))
    with pytest.raises(DataError, match="record 'r0': turn 2 is from 'human'"):
        build_conversation(made)
