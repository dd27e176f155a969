"""LLaVA-1.5 as a model to be tuned: parts, samples, and the forward up to the output layer."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_vlm_samples import siglip
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from kuea_mllm.adapters import loading
from kuea_mllm.adapters.base import MLLMTuner, TuningFormat
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.packing import without_rows
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.errors import DataError, UserError

ADAPTER = LlavaAdapter()
LLAVA = LlavaForConditionalGeneration
PATCHES = 16
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Any:
    return ADAPTER.load_for_tuning(tiny_llava, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reading(tiny_llava: Path) -> TuningFormat:
    return ADAPTER.tuning_format(tiny_llava, max_length=512)


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def rows(model: Any) -> list[list[int]]:
    """Two rows with an image, one without, of different lengths."""
    image = [model.config.image_token_id] * PATCHES
    return [[1, *image, 270, 280], [1, 290, 300, 310, 320, 264], [1, 266, *image, 299, 300, 301]]


def padded(samples: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, samples))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in samples])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in samples])
    return {"input_ids": ids, "attention_mask": mask}


def packed(samples: list[list[int]]) -> dict[str, Tensor]:
    positions = [place for row in samples for place in range(len(row))]
    return {
        "input_ids": torch.tensor([[token for row in samples for token in row]]),
        "position_ids": torch.tensor([positions]),
    }


@torch.no_grad()
def alone(model: Any, samples: list[list[int]], images: Tensor) -> list[Tensor]:
    """The hidden states of each sample by itself."""
    states, used = [], 0
    for row in samples:
        batch = padded([row])
        if model.config.image_token_id in row:
            batch["pixel_values"] = images[used : used + 1]
            used += 1
        states.append(ADAPTER.hidden_states(model, batch)[0])
    return states


def edited(base: Path, **changes: object) -> Path:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return base


def test_adapter_is_a_tuner() -> None:
    assert isinstance(ADAPTER, MLLMTuner)


def test_only_layers_of_the_language_model_are_targets(tiny_llava: Path) -> None:
    parts = ADAPTER.tuning_parts(tiny_llava)
    empty = ADAPTER.build_empty(tiny_llava)
    assert all(parameter.is_meta for parameter in empty.parameters())
    targets = linear_targets(empty, parts)
    assert {path.rpartition(".")[2] for path in targets} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert len(targets) == 7 * 2
    assert all(path.startswith("model.language_model.layers.") for path in targets)
    for path in (*parts.projector, parts.vision_tower, parts.output_head):
        assert list(empty.get_submodule(path).parameters())


def test_loaded_model_has_the_empty_models_tensors_and_asks_for_no_gradient(
    model: Any, tiny_llava: Path
) -> None:
    empty = ADAPTER.build_empty(tiny_llava)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in empty.named_parameters()
    }
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_vocabulary_ends_before_image_and_padding_tokens(tiny_llava: Path) -> None:
    words = json.loads((tiny_llava / "tokenizer.json").read_text())["model"]["vocab"]
    rows = json.loads((tiny_llava / "config.json").read_text())["text_config"]["vocab_size"]
    assert ADAPTER.tuning_parts(tiny_llava).vocabulary_size == len(words) < rows


def change_tokenizer(base: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return base


def test_token_that_was_in_the_vocabulary_before_stays(variant: Callable[..., Path]) -> None:
    def add(content: dict[str, Any]) -> None:
        last = content["added_tokens"][-1]
        content["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<own>"})

    base = variant()
    before = ADAPTER.tuning_parts(base).vocabulary_size
    # <pad> and <image> are then not the last ones, and nothing says that they are additions.
    assert ADAPTER.tuning_parts(change_tokenizer(base, add)).vocabulary_size == before + 3


def test_tokenizer_with_gaps_is_refused(variant: Callable[..., Path]) -> None:
    def leave_gap(content: dict[str, Any]) -> None:
        del content["model"]["vocab"]["z"]

    with pytest.raises(UserError, match=r"tokenizer\.json has no token with the id \d+"):
        ADAPTER.tuning_parts(change_tokenizer(variant(), leave_gap))


def test_tokenizer_beyond_the_output_layer_is_refused(variant: Callable[..., Path]) -> None:
    base = variant()
    text = json.loads((base / "config.json").read_text())["text_config"]
    with pytest.raises(UserError, match=r"has \d+ tokens, config\.json says vocab_size 333"):
        ADAPTER.tuning_parts(
            edited(base, text_config=text | {"vocab_size": 333}, image_token_index=332)
        )


@pytest.mark.parametrize(("token", "words"), [(270, "ordinary token"), (384, "has no row")])
def test_impossible_image_token_is_refused(
    variant: Callable[..., Path], token: int, words: str
) -> None:
    with pytest.raises(UserError, match=f"image_token_index {token} .*{words}"):
        ADAPTER.tuning_parts(variant(image_token_index=token))


def test_missing_fast_tokenizer_is_refused(variant: Callable[..., Path]) -> None:
    base = variant()
    (base / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        ADAPTER.tuning_parts(base)


def test_original_layout_is_refused(variant: Callable[..., Path]) -> None:
    base = variant(mm_vision_tower="openai/clip", model_type="llava_llama")
    for call in (ADAPTER.tuning_parts, ADAPTER.build_empty):
        with pytest.raises(UserError, match="original layout"):
            call(base)
    with pytest.raises(UserError, match="original layout"):
        ADAPTER.load_for_tuning(base, dtype="float32", device="cpu")


def test_format_is_that_of_the_goldens(reading: TuningFormat, model: Any) -> None:
    record = {
        "id": "a",
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "This."},
        ],
    }
    encoded = reading.encoder.encode(record)
    assert encoded.input_ids.count(reading.encoder.placeholder) == 1
    assert [label for label in encoded.labels if label != -100] == encoded.input_ids[-7:]
    assert reading.image_token_id == model.config.image_token_id
    assert (reading.tokens_per_image, reading.image_size) == (PATCHES, 16)
    values = reading.preprocess([Image.new("RGB", (40, 10), "red"), Image.new("L", (3, 9))])
    assert (values.shape, values.dtype) == ((2, 3, 16, 16), torch.float32)


class Worker:
    """What a worker of a data loader does with a format."""

    def __init__(self, reading: TuningFormat) -> None:
        self.reading = reading

    def __call__(self, numbers: list[int]) -> tuple[list[int], Tensor]:
        record = {"conversations": [{"from": "human", "value": str(number)} for number in numbers]}
        image = Image.new("RGB", (20, 10 + numbers[0]), "red")
        return self.reading.encoder.encode(record).input_ids, self.reading.preprocess([image])


def test_format_survives_pickling_and_works_in_workers(reading: TuningFormat) -> None:
    content = pickle.dumps(reading)
    assert len(content) < 200_000
    here = Worker(reading)
    loader: Any = DataLoader(range(3), batch_size=1, num_workers=1, collate_fn=Worker(reading))
    for number, (ids, values) in enumerate(loader):
        for expected, found in zip(here([number]), (ids, values), strict=True):
            assert torch.equal(torch.as_tensor(expected), torch.as_tensor(found))
    again = Worker(pickle.loads(content))([1])
    assert again[0] == here([1])[0]
    assert torch.equal(again[1], here([1])[1])


def test_mixed_rows_have_the_states_of_single_rows(model: Any) -> None:
    samples, images = rows(model), pixels(2)
    with torch.no_grad():
        together = ADAPTER.hidden_states(model, {**padded(samples), "pixel_values": images})
    for row, states in zip(together, alone(model, samples, images), strict=True):
        torch.testing.assert_close(row[: len(states)], states, rtol=0, atol=TOLERANCE)


def test_states_are_those_of_the_models_own_forward(model: Any) -> None:
    batch = {**padded(rows(model)), "pixel_values": pixels(2)}
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        assert torch.equal(model.lm_head(ADAPTER.hidden_states(model, batch)), logits)


def test_rows_of_text_need_no_images(model: Any) -> None:
    batch = padded([rows(model)[1]])
    with torch.no_grad():
        states = ADAPTER.hidden_states(model, batch)
        assert torch.equal(model.lm_head(states), model(**batch).logits)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 1, 0)])
def test_packed_samples_do_not_see_each_other(model: Any, order: tuple[int, ...]) -> None:
    samples = [rows(model)[number] for number in order]
    images = pixels(sum(number != 1 for number in order))
    batch = {**packed(samples), "pixel_values": images}
    with torch.no_grad():
        joined = ADAPTER.hidden_states(model, batch)[0]
        # Positions alone keep nothing apart: with a mask, transformers does not look at them.
        mask = torch.ones_like(batch["input_ids"])
        mixed = ADAPTER.hidden_states(model, {**batch, "attention_mask": mask})[0]
    expected = torch.cat(alone(model, samples, images))
    torch.testing.assert_close(joined, expected, rtol=0, atol=TOLERANCE)
    assert float((mixed - expected).abs().max()) > 100 * TOLERANCE


def test_packed_rows_may_be_several(model: Any) -> None:
    samples = [row[:6] for row in rows(model)]
    samples = [[1, 270, 280], [1, 290, 300, 310], *reversed(samples[1:2]), [1]]
    two = [packed(samples[:2]), packed(samples[2:])]
    batch = {key: torch.cat([row[key] for row in two]) for key in two[0]}
    with torch.no_grad():
        states = ADAPTER.hidden_states(model, batch)
    expected = torch.stack(
        [torch.cat(alone(model, half, pixels(1))) for half in (samples[:2], samples[2:])]
    )
    torch.testing.assert_close(states, expected, rtol=0, atol=TOLERANCE)


def test_flash_attention_gets_packed_rows_as_one(model: Any) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    batch = {"input_ids": torch.randint(260, 300, (2, 5)), "position_ids": positions}
    joined = without_rows(batch, "flash_attention_2")
    assert joined["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1, 2]]
    with torch.no_grad():
        expected = ADAPTER.hidden_states(model, batch)
        found = ADAPTER.hidden_states(model, joined).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert without_rows(batch, "sdpa") is batch
    unpacked = padded([[1, 2], [3, 4]])
    assert without_rows(unpacked, "flash_attention_2") is unpacked


def test_wrong_number_of_image_tokens_is_refused(model: Any) -> None:
    with pytest.raises(DataError, match="has 32 image tokens, its 1 images take 16"):
        ADAPTER.hidden_states(model, {**padded(rows(model)), "pixel_values": pixels(1)})


def test_features_are_the_models_own(model: Any) -> None:
    with torch.no_grad():
        expected = torch.stack(model.get_image_features(pixels(2)).pooler_output)
        assert torch.equal(ADAPTER.image_features(model, pixels(2)), expected)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_features_of_a_siglip_tower_are_the_models_own(strategy: str) -> None:
    config = LlavaConfig(
        vision_config=siglip(),
        text_config=LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=9),
        vision_feature_layer=[-1, 1],
        vision_feature_select_strategy=strategy,
        image_token_index=3,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        expected = torch.stack(model.get_image_features(pixels(2)).pooler_output)
        found = ADAPTER.image_features(model, pixels(2))
    assert found.shape[1] == 16 - (strategy == "default")
    assert torch.equal(found, expected)


def test_gradient_reaches_the_projector_and_never_the_tower(tiny_llava: Path) -> None:
    model: Any = ADAPTER.load_for_tuning(tiny_llava, dtype="float32", device="cpu")
    # As PEFT does for gradient checkpointing; it also hooks the tower's patch embeddings.
    model.enable_input_require_grads()
    model.model.multi_modal_projector.requires_grad_(True)
    seen: list[bool] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].requires_grad)
    )
    batch = {**padded(rows(model)), "pixel_values": pixels(2)}
    ADAPTER.hidden_states(model, batch).square().sum().backward()
    hook.remove()
    assert seen == [False]
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    assert trained == {
        f"model.multi_modal_projector.linear_{layer}.{kind}"
        for layer in (1, 2)
        for kind in ("weight", "bias")
    }


def nf4(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def test_language_model_alone_can_be_quantised(tiny_llava: Path) -> None:
    outside = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    quantised: Any = ADAPTER.load_for_tuning(
        tiny_llava,
        dtype="float32",
        device="cpu",
        quantization=nf4(llm_int8_skip_modules=outside),
    )
    targets = linear_targets(quantised, ADAPTER.tuning_parts(tiny_llava))
    assert len(targets) == 14
    assert {layer.weight.dtype for layer in targets.values()} == {torch.uint8}
    assert {type(layer) for layer in targets.values()} != {nn.Linear}
    # In evaluation mode bitsandbytes repacks weights on some processors, not of every shape.
    states = ADAPTER.hidden_states(quantised.train(), padded(rows(quantised)[1:2]))
    assert bool(states.isfinite().all())


def test_quantised_tower_is_refused(tiny_llava: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vision_tower\..* was quantised"):
        ADAPTER.load_for_tuning(tiny_llava, dtype="float32", device="cpu", quantization=nf4())


def test_quantised_directory_is_checked_as_any_other(variant: Callable[..., Path]) -> None:
    base = variant(prefix="tower_vision.")
    with pytest.raises(UserError, match="missing keys"):
        ADAPTER.load_for_tuning(base, dtype="float32", device="cpu", quantization=nf4())


@pytest.mark.parametrize(
    ("loader", "device", "dtype", "installed", "chosen", "reason"),
    [
        (LLAVA, "cpu", torch.bfloat16, True, "sdpa", "the device is cpu"),
        (LLAVA, "cuda", torch.float32, True, "sdpa", "does not compute in torch.float32"),
        (nn.Linear, "cuda", torch.bfloat16, True, "sdpa", "Linear has no flash attention"),
        (LLAVA, "cuda", torch.bfloat16, False, "sdpa", "not installed"),
        (LLAVA, "cuda", torch.bfloat16, True, "flash_attention_2", "is installed"),
    ],
)
def test_attention_is_chosen_by_what_is_there_and_said(
    loader: type,
    device: str,
    dtype: torch.dtype,
    installed: bool,
    chosen: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("kuea_mllm"), "propagate", True)
    monkeypatch.setattr(
        "transformers.utils.import_utils.is_flash_attn_2_available", lambda: installed
    )
    with caplog.at_level("INFO", logger="kuea_mllm"):
        assert loading.choose_attention(loader, torch.device(device), dtype) == chosen
    assert f"attention: {chosen}" in caplog.text
    assert reason in caplog.text
