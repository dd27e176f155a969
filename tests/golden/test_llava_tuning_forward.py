"""The forward that tuning uses gives the losses of the original code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llava import original_directory, tower_directory, tower_of
from safetensors.torch import load_file
from test_llava_forward import (
    FORWARD,
    MODEL,
    RUNS,
    TOLERANCE,
    VOCABULARY,
    inputs_of,
    token_losses,
)

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava.import_original import import_original

ADAPTER = LlavaAdapter()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning_forward")
    state = load_file(MODEL / "weights.safetensors")
    tower = tower_directory(folder / "tower", tower_of(state))
    names = RUNS["token_ids_from"]
    original = original_directory(folder / "original", state, tower, tokenizer=names)
    import_original(original, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def model(converted: Path) -> Any:
    return ADAPTER.load_for_tuning(converted, dtype="float32", device="cpu")


def test_vocabulary_is_the_original_one(converted: Path) -> None:
    assert ADAPTER.tuning_parts(converted).vocabulary_size == VOCABULARY


@pytest.mark.parametrize("run", list("ABCD"))
@torch.no_grad()
def test_losses_equal_the_original(model: Any, converted: Path, run: str) -> None:
    states = ADAPTER.hidden_states(model, inputs_of(run))
    head = model.lm_head.weight[: ADAPTER.tuning_parts(converted).vocabulary_size]
    losses, counts = token_losses(states @ head.T, FORWARD[f"{run}.spliced_labels"])
    assert abs(float(losses[counts].mean() - FORWARD[f"{run}.loss"])) <= TOLERANCE
    for number, expected in enumerate(FORWARD.get(f"{run}.per_sample_loss", ())):
        assert abs(float(losses[number][counts[number]].mean() - expected)) <= TOLERANCE


@torch.no_grad()
def test_packed_samples_have_their_losses_alone(model: Any) -> None:
    inputs = inputs_of("B")
    kept = inputs["attention_mask"].bool()
    lengths = kept.sum(dim=1).tolist()
    packed = {
        "input_ids": inputs["input_ids"][kept][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "pixel_values": inputs["pixel_values"],
    }
    states = ADAPTER.hidden_states(model, packed)[0].split(lengths)
    labels = FORWARD["B.spliced_labels"]
    assert len(lengths) > 1
    for number, (row, length) in enumerate(zip(states, lengths, strict=True)):
        logits = (row @ model.lm_head.weight.T)[None]
        losses, counts = token_losses(logits, labels[number : number + 1, :length])
        expected = FORWARD["B.per_sample_loss"][number]
        assert abs(float(losses[counts].mean() - expected)) <= TOLERANCE
