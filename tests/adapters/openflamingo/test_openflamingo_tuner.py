"""OpenFlamingo's language model as a model to be tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from tiny_flamingo import SIDE, save_tiny_base
from torch import Tensor

from kuea_mllm.adapters.base import MLLMTuner, TuningFormat
from kuea_mllm.adapters.conformance import tuner_problems_of
from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.adapters.openflamingo.runtime import build_prompt
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.config.lora import LoraConfig
from kuea_mllm.errors import DataError, UserError
from kuea_mllm.tuning.wrap import wrap_with_lora

ADAPTER = OpenFlamingoAdapter()
TOLERANCE = 2e-5
CHAT = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "\nRed "},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("flamingo") / "base")


@pytest.fixture(scope="module")
def reading(base: Path) -> TuningFormat:
    return ADAPTER.tuning_format(base, max_length=256)


def load(base: Path) -> Any:
    return ADAPTER.load_for_tuning(base, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load(base)


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))


def rows(model: Any) -> list[list[int]]:
    image = model.config.image_token_id
    return [[image, 5, 6, 7, 8], [9, 10, 11], [12, image, 13, 14, 15, 16, 17]]


def batch_of(samples: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, samples))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in samples]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in samples]
        ),
    }


@torch.no_grad()
def alone(model: Any, samples: list[list[int]], images: Tensor) -> list[Tensor]:
    """The hidden states of each sample, through the model's own forward."""
    states, used = [], 0
    for row in samples:
        given: dict[str, Tensor] = {"input_ids": torch.tensor([row])}
        if model.config.image_token_id in row:
            given["pixel_values"] = images[None, used : used + 1]
            used += 1
        states.append(model(**given, output_hidden_states=True).hidden_states[-1][0])
    return states


def test_adapter_is_a_tuner() -> None:
    assert isinstance(ADAPTER, MLLMTuner)


def test_lora_goes_into_the_language_models_own_layers_alone(base: Path) -> None:
    empty = ADAPTER.build_empty(base)
    assert all(parameter.is_meta for parameter in empty.parameters())
    targets = linear_targets(empty, ADAPTER.tuning_parts(base))
    assert set(targets) == {
        f"model.language_model.layers.{layer}.{name}"
        for layer in range(3)
        for name in ("attention.qkv_proj", "attention.out_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_vocabulary_is_the_whole_table(base: Path, model: Any) -> None:
    assert ADAPTER.tuning_parts(base).vocabulary_size == len(model.lm_head.weight)


def test_answers_and_their_ends_are_learned(reading: TuningFormat, model: Any) -> None:
    encoder: Any = reading.encoder
    encoded = encoder.encode({"id": "a", "image": "a.jpg", "conversations": CHAT})
    learned = [token for token in encoded.labels if token != -100]
    assert encoder.tokenizer.decode(learned) == "A cat.<|endofchunk|>Red<|endofchunk|>"
    ids = [model.config.image_token_id if t == -200 else t for t in encoded.input_ids]
    assert encoder.tokenizer.decode(ids) == (
        "<image>Question:What is it? Short answer:A cat.<|endofchunk|>\n"
        "Question:Which colour? Short answer:Red<|endofchunk|>"
    )
    asked = encoder.tokenizer(build_prompt("What is it?", image_count=1))["input_ids"]
    assert ids[: len(asked)] == asked
    assert set(encoded.labels[: len(asked)]) == {-100}


@pytest.mark.parametrize("number", [0, 1])
def test_image_stands_before_the_question_that_names_it(reading: TuningFormat, number: int) -> None:
    turns = [{"from": "human", "value": f"q{n}"} if n % 2 == 0 else CHAT[1] for n in range(4)]
    turns[2 * number]["value"] += " <image>"
    found = reading.encoder.encode({"image": "a.jpg", "conversations": turns}).input_ids
    before = reading.encoder.encode({"conversations": turns[:2]}).input_ids
    assert found.index(-200) == (0 if number == 0 else len(before) + 1)
    untagged = [{**turn, "value": turn["value"].replace("<image>", "")} for turn in turns]
    ids = reading.encoder.encode({"image": "a.jpg", "conversations": untagged}).input_ids
    assert ids.index(-200) == 0


def test_tokens_of_the_format_in_a_text_are_left_out(reading: TuningFormat) -> None:
    def encode(question: str, answer: str) -> Any:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return reading.encoder.encode({"conversations": turns})

    assert encode("<image>a<PAD>", "b<|endofchunk|>") == encode("a", "b")


def test_answer_without_a_question_is_dropped_and_disorder_refused(reading: TuningFormat) -> None:
    encode = reading.encoder.encode
    assert encode({"conversations": [CHAT[1], *CHAT]}) == encode({"conversations": CHAT})
    with pytest.raises(DataError, match="record 'r': turn 2 is from 'human'"):
        encode({"id": "r", "conversations": [CHAT[0], CHAT[2]]})


def test_images_are_the_models_own(reading: TuningFormat) -> None:
    values = reading.preprocess([Image.new("RGB", (40, 20), "red"), Image.new("L", (9, 30))])
    assert (values.shape, values.dtype) == ((2, 3, SIDE, SIDE), torch.float32)
    assert reading.image_size == SIDE


def test_samples_beyond_the_context_are_refused(base: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_length' is 257; .* reads 256"):
        ADAPTER.tuning_format(base, max_length=257)


def test_mixed_rows_have_the_states_of_the_models_own_forward(model: Any) -> None:
    samples, images = rows(model), pixels(2)
    with torch.no_grad():
        together = ADAPTER.hidden_states(model, {**batch_of(samples), "pixel_values": images})
    for row, states in zip(together, alone(model, samples, images), strict=True):
        torch.testing.assert_close(row[: len(states)], states, rtol=0, atol=TOLERANCE)


def test_rows_of_text_need_no_images(model: Any) -> None:
    text = rows(model)[1]
    with torch.no_grad():
        states = ADAPTER.hidden_states(model, batch_of([text]))[0]
    torch.testing.assert_close(states, alone(model, [text], pixels(0))[0], rtol=0, atol=TOLERANCE)


def test_packed_samples_see_neither_each_other_nor_their_images(model: Any) -> None:
    samples, images = rows(model), pixels(2)
    ids = [token for row in samples for token in row]
    positions = [place for row in samples for place in range(len(row))]
    batch = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "pixel_values": images,
    }
    with torch.no_grad():
        states = ADAPTER.hidden_states(model, batch)[0]
    expected = torch.cat(alone(model, samples, images))
    torch.testing.assert_close(states, expected, rtol=0, atol=TOLERANCE)


def test_wrong_number_of_images_is_refused(model: Any) -> None:
    with pytest.raises(DataError, match="has 2 <image> tokens and 1 images"):
        ADAPTER.hidden_states(model, {**batch_of(rows(model)), "pixel_values": pixels(1)})


def test_features_are_the_models_own(model: Any) -> None:
    with torch.no_grad():
        found, expected = ADAPTER.image_features(model, pixels(2)), model.encode_images(pixels(2))
    assert torch.equal(found, expected)


def wrapped(base: Path, projector: Literal["train", "freeze"]) -> Any:
    config = LoraConfig(rank=4, alpha=8.0, dropout=0.0, projector=projector)
    model = wrap_with_lora(load(base), ADAPTER.tuning_parts(base), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("projector", ["freeze", "train"])
def test_gradient_is_in_lora_and_in_the_perceiver_where_asked(
    base: Path, projector: Literal["train", "freeze"]
) -> None:
    model = wrapped(base, projector)
    inner = model.get_base_model()
    batch = {**batch_of(rows(inner)), "pixel_values": pixels(2)}
    ADAPTER.hidden_states(inner, batch).square().sum().backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    perceiver = {name for name in trained if ".resampler.modules_to_save." in name}
    assert bool(perceiver) == (projector == "train")
    assert {name.split(".")[-3] for name in trained - perceiver} == {"lora_A", "lora_B"}
    assert all(".language_model.layers." in name for name in trained - perceiver)


@torch.no_grad()
def test_merged_model_answers_as_the_adapter(base: Path) -> None:
    model = wrapped(base, "freeze")
    inner = model.get_base_model()
    batch = {**batch_of(rows(inner)), "pixel_values": pixels(2)}
    kept = batch["attention_mask"].bool()
    tuned = inner.lm_head(ADAPTER.hidden_states(inner, batch))[kept]
    merged: Any = model.merge_and_unload()
    found = merged.lm_head(ADAPTER.hidden_states(merged, batch))[kept]
    plain: Any = load(base)
    before = plain.lm_head(ADAPTER.hidden_states(plain, batch))[kept]
    scale = float(tuned.abs().max())
    assert float((found - tuned).abs().max()) <= 1e-5 * scale
    assert float((before - tuned).abs().max()) > 1e-2 * scale


def test_adapter_conforms(base: Path) -> None:
    assert tuner_problems_of(ADAPTER, base) == []
