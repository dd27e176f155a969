"""Token ids, labels and batches of training against the original code (see llava/index.json)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from kuea_mllm.adapters.llava.original_tokenizer import write_tokenizer
from kuea_mllm.adapters.llava.tuning import (
    IMAGE_PLACEHOLDER,
    LlavaConversations,
    build_conversation,
    encode_conversation,
)
from kuea_mllm.tuning.collate import Collator
from kuea_mllm.tuning.examples import Example
from kuea_mllm.tuning.mixture import open_mixture

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
RECORDS: list[dict[str, Any]] = json.loads(
    (GOLDEN / "preprocess" / "conversations.json").read_text()
)
COLLATED = load_file(GOLDEN / "preprocess" / "collated.safetensors")
MODES = ["legacy", "nonlegacy"]
BATCHES = sorted({key.rpartition(".")[0] for key in COLLATED})


def expected(mode: str) -> dict[int, list[dict[str, Any]]]:
    content = json.loads((GOLDEN / "preprocess" / f"expected_{mode}.json").read_text())
    return {int(key.rpartition("=")[2]): samples for key, samples in content.items()}


def collator(
    image: int, patches: int, *, max_length: int, pad: int | None = None, is_cut_twice: bool = False
) -> Collator:
    return Collator(
        placeholder=IMAGE_PLACEHOLDER,
        image_token_id=image,
        tokens_per_image=patches,
        pad_token_id=image + 1 if pad is None else pad,
        max_length=max_length,
        cut_after_splicing=is_cut_twice,
    )


@pytest.fixture(params=["original tokenizer", "converted tokenizer"])
def tokenizer_of(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Give the tokenizer of a mode, as delivered or with `<image>` and `<pad>` added."""

    def load(mode: str) -> Any:
        folder = GOLDEN / f"tokenizer_{mode}"
        if request.param == "converted tokenizer":
            (tmp_path / mode).mkdir()
            write_tokenizer(folder, tmp_path / mode)
            folder = tmp_path / mode
        return AutoTokenizer.from_pretrained(folder)

    return load


@pytest.mark.parametrize("mode", MODES)
def test_ids_and_labels_equal_the_original(mode: str, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(mode)
    checked = 0
    for max_length, samples in expected(mode).items():
        encoder = LlavaConversations(tokenizer, max_length=max_length)
        for record, sample in zip(RECORDS, samples, strict=True):
            found = encoder.encode(record)
            assert found.input_ids == sample["input_ids"], sample["id"]
            assert found.labels == sample["labels"], sample["id"]
            assert found.warning == sample["warning"], sample["id"]
            assert (record.get("image") is not None) == sample["has_image"]
            checked += 1
    assert checked >= 2 * len(RECORDS)


@pytest.mark.parametrize("mode", MODES)
def test_one_record_at_a_time_gives_the_same(mode: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / f"tokenizer_{mode}")
    max_length, samples = next(iter(expected(mode).items()))
    ids, labels, warning, _ = encode_conversation(RECORDS[0], tokenizer, max_length=max_length)
    sample = samples[0]
    assert (ids, labels, warning) == (sample["input_ids"], sample["labels"], sample["warning"])


@pytest.mark.parametrize("mode", MODES)
def test_prompts_equal_the_original(mode: str) -> None:
    with_prompt = 0
    for samples in expected(mode).values():
        for record, sample in zip(RECORDS, samples, strict=True):
            if "prompt" in sample:
                assert build_conversation(record) == sample["prompt"]
                with_prompt += 1
    assert with_prompt >= len(RECORDS)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_equal_the_original(name: str) -> None:
    match = re.fullmatch(r"(\w+)\.maxlen(\d+)", name)
    assert match is not None
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / f"tokenizer_{match[1]}")
    encoder = LlavaConversations(tokenizer, max_length=int(match[2]))
    collate = collator(
        IMAGE_PLACEHOLDER, 1, max_length=encoder.max_length, pad=encoder.pad_token_id
    )
    examples = []
    for index, record in enumerate(RECORDS):
        ids, labels, _, left_out = encoder.encode(record)
        pixels = torch.zeros(3, 2, 2) if record.get("image") else None
        examples.append(Example(index, ids, labels, pixels, left_out))
    batch = collate(examples)
    assert torch.equal(batch["input_ids"], COLLATED[f"{name}.input_ids"])
    assert torch.equal(batch["labels"], COLLATED[f"{name}.labels"])
    assert torch.equal(batch["attention_mask"].bool(), COLLATED[f"{name}.attention_mask"])
    assert len(batch["pixel_values"]) == sum("image" in record for record in RECORDS)


@pytest.mark.parametrize("mode", MODES)
def test_arrow_file_loses_nothing(mode: str, tmp_path: Path) -> None:
    """What is tokenized is the same whether a record went through the mixture or not."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / f"tokenizer_{mode}")
    encoder = LlavaConversations(tokenizer, max_length=2048)
    mixture = open_mixture(
        GOLDEN / "preprocess" / "conversations.json", cache=tmp_path, progress=False
    )
    assert len(mixture) == len(RECORDS)
    for index, record in enumerate(RECORDS):
        assert encoder.encode(mixture.record(index)) == encoder.encode(record)
        words = sum(len(turn["value"].split()) for turn in record["conversations"])
        assert mixture.lengths()[index] == (words if "image" in record else -words)


def golden_rows(run: str) -> tuple[dict[str, torch.Tensor], list[Example], int]:
    tensors = load_file(GOLDEN / "model" / "forward.safetensors")
    ids, mask = tensors[f"{run}.input_ids"], tensors[f"{run}.attention_mask"]
    rows = []
    for number in range(len(ids)):
        row, labels = (
            tensors[f"{run}.{name}"][number, mask[number]].tolist()
            for name in ("input_ids", "labels")
        )
        pixels = tensors[f"{run}.pixel_values"][number] if IMAGE_PLACEHOLDER in row else None
        rows.append(Example(number, row, labels, pixels, 0))
    patches = tensors[f"{run}.hf_expanded_input_ids"].shape[1] - ids.shape[1] + 1
    return tensors, rows, patches


@pytest.mark.parametrize("run", ["A", "B"])
def test_expanded_rows_are_those_of_the_converted_model(run: str) -> None:
    tensors, rows, patches = golden_rows(run)
    expected = tensors[f"{run}.hf_expanded_input_ids"]
    image = int(tensors["A.hf_expanded_input_ids"].mode().values)
    batch = collator(image, patches, max_length=2048, is_cut_twice=True)(rows)
    assert torch.equal(batch["input_ids"], expected)
    assert torch.equal(batch["labels"], tensors[f"{run}.spliced_labels"])
    spliced_mask = tensors[f"{run}.spliced_attention_mask"]
    assert torch.equal(batch["attention_mask"].bool(), spliced_mask)
    with_image = [number for number, row in enumerate(rows) if row.pixels is not None]
    assert torch.equal(batch["pixel_values"], tensors[f"{run}.pixel_values"][with_image])


def test_second_cut_equals_the_original() -> None:
    tensors, rows, patches = golden_rows("B")
    expected = tensors["C.spliced_labels"]
    batch = collator(3, patches, max_length=expected.shape[1], is_cut_twice=True)(rows)
    assert torch.equal(batch["labels"], expected)
    assert torch.equal(batch["attention_mask"].bool(), tensors["C.spliced_attention_mask"])
