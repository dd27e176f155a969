"""Prompts and token ids against the original LLaVA code (see llava/index.json)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kuea_mllm.adapters.llava.prompt import build_prompt, tokenize_prompt

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
IMAGE_ID = -200


def first_question(record: dict[str, Any]) -> str:
    turns = record["conversations"]
    question: str = next(turn["value"] for turn in turns if turn["from"] == "human")
    return question


@pytest.mark.parametrize("mode", ["legacy", "nonlegacy"])
def test_prompt_part_equals_the_original(mode: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / f"tokenizer_{mode}")
    records = json.loads((GOLDEN / "preprocess" / "conversations.json").read_text())
    expected = json.loads((GOLDEN / "preprocess" / f"expected_{mode}.json").read_text())
    checked = 0
    for samples in expected.values():
        for record, sample in zip(records, samples, strict=True):
            assert record["id"] == sample["id"]
            prompt = build_prompt(first_question(record), image_count=int(sample["has_image"]))
            if "prompt" in sample:
                assert sample["prompt"].startswith(prompt), sample["id"]
            ids = tokenize_prompt(prompt, tokenizer, image_token_id=IMAGE_ID, tokens_per_image=1)
            # The shorter list is the truncated one of a text-only sample.
            length = min(len(ids), len(sample["input_ids"]))
            assert ids[:length] == sample["input_ids"][:length], sample["id"]
            checked += 1
    assert checked == len(records) * len(expected) > 0


def test_image_token_is_repeated_per_patch() -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer_nonlegacy")
    prompt = build_prompt("What is it?", image_count=1)
    once = tokenize_prompt(prompt, tokenizer, image_token_id=IMAGE_ID, tokens_per_image=1)
    often = tokenize_prompt(prompt, tokenizer, image_token_id=IMAGE_ID, tokens_per_image=9)
    place = once.index(IMAGE_ID)
    assert often == [*once[:place], *[IMAGE_ID] * 9, *once[place + 1 :]]
