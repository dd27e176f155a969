"""PNG and prompt in, ids, pixels, text and class probabilities out, against the original."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from openflamingo_golden import (
    TOLERANCE,
    build_processor,
    golden_model,
    index,
    openflamingo_dir,
    tensors,
    worst,
)
from PIL import Image
from torch import Tensor

from kuea_mllm.adapters.openflamingo.processing import OpenFlamingoProcessor

PIPELINE: dict[str, Any] = json.loads((openflamingo_dir() / "pipeline.json").read_text())
STORED = tensors("pipeline.safetensors")
RUNS: dict[str, dict[str, Any]] = PIPELINE["runs"]
DECODED = [name for name, run in RUNS.items() if "decoded" in run]
RANKED = [name for name, run in RUNS.items() if "class_names" in run]
IDS = index()["config"]["ids"]


@cache
def processor() -> OpenFlamingoProcessor:
    return build_processor()


def picture(number: int) -> Image.Image:
    return Image.open(io.BytesIO(STORED[f"image{number}.png_bytes"].numpy().tobytes()))


def prepared(name: str) -> dict[str, Tensor]:
    run = RUNS[name]
    images = [[picture(number) for number in row] for row in run["image_indices"]]
    # The published zero-shot ranking hands over more images than the text has places for.
    batch = processor()(text=run["text"], images=images, released_counts=True)
    return dict(batch)


def test_tokenizer_has_the_three_tokens_where_the_checkpoint_expects_them() -> None:
    tokenizer = processor().tokenizer
    assert len(tokenizer) == index()["config"]["embedding_rows_after_resize"]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in IDS} == IDS
    assert {token: tokenizer.encode(token)[-1] for token in IDS} == IDS
    assert tokenizer.pad_token_id == IDS["<PAD>"]
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("entry", PIPELINE["images"], ids=lambda entry: str(entry["mode"]))
def test_pixel_values_equal_the_original(entry: dict[str, Any]) -> None:
    image = picture(entry["index"])
    assert image.mode == entry["mode"]
    found = processor().image_processor(image)["pixel_values"][0]
    assert worst(found, STORED[f"image{entry['index']}.pixel_values"]) <= 1e-6


@pytest.mark.parametrize("name", RUNS)
def test_prompts_become_the_ids_of_the_original(name: str) -> None:
    batch = prepared(name)
    assert torch.equal(batch["input_ids"], STORED[f"{name}.input_ids"])
    assert torch.equal(batch["attention_mask"], STORED[f"{name}.attention_mask"])
    for row, numbers in enumerate(RUNS[name]["image_indices"]):
        for place, number in enumerate(numbers):
            expected = STORED[f"image{number}.pixel_values"]
            assert worst(batch["pixel_values"][row, place], expected) <= 1e-6
        assert not batch["pixel_values"][row, len(numbers) :].any()


@pytest.mark.parametrize("name", DECODED)
def test_answers_equal_the_original(name: str) -> None:
    run, batch = RUNS[name], prepared(name)
    sequences = golden_model().generate(
        **batch,
        num_beams=run["num_beams"],
        max_new_tokens=run["max_new_tokens"],
        length_penalty=run["length_penalty"],
        do_sample=False,
        eos_token_id=IDS["<|endofchunk|>"],
        pad_token_id=IDS["<|endofchunk|>"],
    )
    assert torch.equal(sequences, STORED[f"{name}.sequences"])
    assert processor().decode_new(sequences, batch["input_ids"].shape[1]) == run["decoded"]


def log_likelihoods(log_probabilities: Tensor, ids: Sequence[int]) -> Tensor:
    """Take the log-probability of each id of a class name, (rows, ids)."""
    return torch.stack([log_probabilities[:, place, token] for place, token in enumerate(ids)], 1)


@torch.no_grad()
def recomputed(batch: dict[str, Tensor], ids: Sequence[int]) -> Tensor:
    """One full pass per class name: the correct way."""
    rows = len(batch["input_ids"])
    name = torch.tensor(ids).expand(rows, -1)
    mask = batch["attention_mask"]
    logits = golden_model()(
        input_ids=torch.cat([batch["input_ids"], name], dim=1),
        attention_mask=torch.cat([mask, torch.ones_like(name, dtype=torch.bool)], dim=1),
        pixel_values=batch["pixel_values"],
    ).logits
    return log_likelihoods(logits.log_softmax(-1)[:, -len(ids) - 1 : -1], ids)


@torch.no_grad()
def cached(batch: dict[str, Tensor], names: Sequence[Sequence[int]]) -> list[Tensor]:
    """The published fast way: no mask on the names, one cache that grows from name to name."""
    model = golden_model()
    context = model(**batch, use_cache=True)
    last = (batch["input_ids"] == IDS["<image>"]).sum(dim=1, keepdim=True)
    found = []
    for ids in names:
        steps = [context.logits[:, -1:]]
        for token in ids:
            output = model(
                input_ids=torch.full_like(last, token),
                image_features=context.image_hidden_states,
                media_index=last,
                past_key_values=context.past_key_values,
            )
            steps.append(output.logits)
        found.append(log_likelihoods(torch.cat(steps, dim=1).log_softmax(-1), ids))
    return found


@pytest.mark.parametrize("name", RANKED)
def test_class_log_likelihoods_equal_the_original(name: str) -> None:
    batch = prepared(name)
    names = RUNS[name]["class_name_token_ids"]
    tokenizer = processor().tokenizer
    texts = RUNS[name]["class_names"]
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == names
    ways = {"recompute": [recomputed(batch, ids) for ids in names], "kvcache": cached(batch, names)}
    for way, found in ways.items():
        for kind, total in (("mean", torch.mean), ("sum", torch.sum)):
            scores = torch.stack([total(values, dim=1) for values in found], dim=1)
            expected = STORED[f"{name}.logprobs_{way}_{kind}"]
            assert worst(scores, expected) <= TOLERANCE, (way, kind)
