"""Properties of the OpenFlamingo model that no golden shows: batches, caches, files, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_flamingo import END, IMAGE, PAD, single_row, tiny_batch, tiny_config, tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    GenerationConfig,
)

from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig
from kuea_mllm.adapters.openflamingo.media import EncodedImages, media_index
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
from kuea_mllm.adapters.openflamingo.registration import register
from kuea_mllm.adapters.openflamingo.released_beam import released_beam_search
from kuea_mllm.errors import UserError

EXACT = 2e-5
BATCH = tiny_batch()
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3, "length_penalty": 0.0},
}
searches = pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)


@torch.no_grad()
def logits_of(model: Any, **given: Any) -> Tensor:
    logits: Tensor = model(**given).logits
    return logits


def generated(model: Any, given: dict[str, Any], **options: Any) -> list[list[int]]:
    """Generate and return the new ids of each row up to the end token."""
    output = model.generate(
        **given, max_new_tokens=8, do_sample=False, eos_token_id=END, pad_token_id=PAD, **options
    )
    rows = output[:, given["input_ids"].shape[1] :].tolist()
    return [row[: row.index(END)] if END in row else [t for t in row if t != PAD] for row in rows]


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("every", [1, 2])
def test_batch_equals_rows_one_by_one(every: int) -> None:
    model = tiny_model(cross_attention_every=every)
    together = logits_of(model, **BATCH)
    for row, mask in enumerate(BATCH["attention_mask"]):
        assert close(together[row][mask], logits_of(model, **single_row(BATCH, row))[0]), row


@searches
def test_generated_batch_equals_rows_one_by_one(options: dict[str, Any]) -> None:
    model = tiny_model()
    # An <image> that nobody gave an image for sees the fillers of the batch, so it is never said.
    options = {**options, "suppress_tokens": [IMAGE, PAD]}
    together = generated(model, BATCH, **options)
    alone = [generated(model, single_row(BATCH, row), **options)[0] for row in range(3)]
    assert together == alone
    assert len({tuple(row) for row in together}) == 3


@searches
@pytest.mark.parametrize("every", [1, 2])
def test_generation_with_cache_equals_without(every: int, options: dict[str, Any]) -> None:
    model = tiny_model(cross_attention_every=every)
    with_cache = generated(model, BATCH, use_cache=True, **options)
    assert with_cache == generated(model, BATCH, use_cache=False, **options)
    assert any(with_cache)


def test_generated_image_token_counts_with_and_without_cache() -> None:
    model = tiny_model()
    prompt = BATCH["input_ids"]
    forced = {
        prompt.shape[1]: torch.tensor([5, IMAGE, 6]),
        prompt.shape[1] + 1: torch.tensor([7, 8, 9]),
    }

    class Force:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if (tokens := forced.get(ids.shape[1])) is not None:
                scores = torch.full_like(scores, -1e9)
                scores[torch.arange(3), tokens] = 0.0
            return scores

    found = [
        generated(model, BATCH, logits_processor=[Force()], use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert found[0] == found[1]
    assert found[0][1][:2] == [IMAGE, 8]


@searches
def test_images_are_encoded_once_per_generation(options: dict[str, Any]) -> None:
    model = tiny_model()
    seen: list[int] = []
    projected: list[int] = []
    model.model.vision_tower.register_forward_hook(
        lambda _, __, output: seen.append(len(output.last_hidden_state))
    )
    for layer in model.model.language_model.layers:
        layer.cross_attention.attention.kv_proj.register_forward_hook(
            lambda _, __, output: projected.append(len(output))
        )
    generated(model, BATCH, **options)
    # Every image once, whatever the number of beams and steps; keys and values once per layer.
    assert seen == [BATCH["pixel_values"].shape[:2].numel()]
    assert projected == [3] * len(model.model.language_model.layers)


def test_features_computed_before_give_the_same() -> None:
    model = tiny_model()
    with torch.no_grad():
        features = model.encode_images(BATCH["pixel_values"])
        one_by_one = torch.stack(
            [
                torch.cat([model.encode_images(image[None]) for image in row])
                for row in BATCH["pixel_values"]
            ]
        )
    assert close(one_by_one, features)
    text = {key: t for key, t in BATCH.items() if key != "pixel_values"}
    expected = logits_of(model, **BATCH)
    assert torch.equal(logits_of(model, **text, image_features=features), expected)
    answers = generated(model, BATCH)
    assert generated(model, {**text, "image_features": features}) == answers


def test_cached_steps_equal_one_pass() -> None:
    model = tiny_model()
    expected = logits_of(model, **BATCH)
    cache = DynamicCache()
    index = media_index(BATCH["input_ids"], IMAGE)
    features = model.encode_images(BATCH["pixel_values"])
    for start, end in ((0, 5), (5, 6), (6, BATCH["input_ids"].shape[1])):
        found = logits_of(
            model,
            input_ids=BATCH["input_ids"][:, start:end],
            attention_mask=BATCH["attention_mask"][:, :end],
            media_index=index[:, start:end],
            image_features=features,
            past_key_values=cache,
        )
        mask = BATCH["attention_mask"][:, start:end]
        assert close(found[mask], expected[:, start:end][mask])


def test_text_sees_the_image_before_it_and_no_other() -> None:
    model = tiny_model()
    row = single_row(BATCH, 0)
    expected = logits_of(model, **row)[0]
    places = (row["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    for number, place in enumerate(places):
        changed = row["pixel_values"].clone()
        changed[0, number] += 1.0
        found = logits_of(model, **{**row, "pixel_values": changed})[0]
        assert torch.equal(found[:place], expected[:place])
        assert not close(found[place:], expected[place:], 1e-3)
    only_own = [
        logits_of(
            model,
            **{**row, "media_index": media_index(row["input_ids"], IMAGE).clamp_max(limit)},
        )
        for limit in (3, 0)
    ]
    assert torch.equal(only_own[0][0], expected)
    assert not close(only_own[1][0], expected, 1e-3)


def test_text_without_images_needs_none() -> None:
    model = tiny_model()
    row = single_row(BATCH, 2)
    assert "pixel_values" not in row
    blank = torch.zeros(1, 2, 3, 16, 16)
    assert close(logits_of(model, **row), logits_of(model, **row, pixel_values=blank))


@pytest.mark.parametrize("given", [BATCH, single_row(BATCH, 0)], ids=["padded", "alone"])
def test_eager_attention_equals_sdpa(
    given: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    expected = logits_of(model, **given)
    with caplog.at_level("WARNING", logger="transformers"):
        model.set_attn_implementation("eager")
    assert not caplog.records
    assert model.config._attn_implementation == "eager"
    assert close(logits_of(model, **given), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_stays_near_float32(
    dtype: torch.dtype, bound: float, implementation: str
) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    mask = BATCH["attention_mask"]
    expected = logits_of(model, **BATCH)[mask]
    half = model.to(dtype)
    given = {**BATCH, "pixel_values": BATCH["pixel_values"].to(dtype)}
    found = logits_of(half, **given)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    error = (found[mask].float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    # Twice what was measured, here and on the golden model.
    assert float(error) <= bound
    nearest = torch.nn.functional.cosine_similarity(found[mask].float(), expected, dim=-1).min()
    assert float(nearest) >= 0.999


def test_bfloat16_bias_of_long_texts_keeps_near_keys_apart() -> None:
    # Measured from the last key, neighbours of an early query would round to the same number.
    from kuea_mllm.adapters.openflamingo.language_model import attention_bias

    config: Any = tiny_config().text_config
    bias = attention_bias(
        config, None, rows=1, queries=2000, past=0, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    near = bias[0, :, 10, :11].float()
    slopes = torch.tensor([2.0 ** (-8 * head / 4) for head in range(1, 5)])
    expected = slopes[:, None] * torch.arange(-10, 1)
    assert close(near, expected, 2**-8)


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what loading writes into a configuration."""
    return {
        key: plain(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in {"dtype", "_name_or_path"}
    }


def test_saved_model_loads_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert "model.language_model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored  # Tied: saved once.
    loader: Any = OpenFlamingoForConditionalGeneration
    loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert plain(loaded.config.to_dict()) == plain(model.config.to_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits_of(loaded.eval(), **BATCH), logits_of(model, **BATCH))


def test_auto_classes_know_it_once_registered(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    register()
    register()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OpenFlamingoConfig)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(loaded, OpenFlamingoForConditionalGeneration)
    assert loaded.dtype == torch.bfloat16


def test_device_map_gives_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    places: dict[str, Any] = {
        "model.vision_tower": "cpu",
        "model.resampler": "disk",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.layers.2": "cpu",
        "model.language_model.norm": "cpu",
        "lm_head": "cpu",
    }
    loader: Any = OpenFlamingoForConditionalGeneration
    spread = loader.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert spread.model.language_model.layers[1].norm_1.weight.device.type == "meta"
    assert close(logits_of(spread, **BATCH), logits_of(model, **BATCH))
    assert generated(spread, BATCH) == generated(model, BATCH)


def test_resized_vocabulary_keeps_output_and_embedding_tied() -> None:
    model = tiny_model()
    before = logits_of(model, **BATCH)
    model.resize_token_embeddings(105, mean_resizing=False)
    after = logits_of(model, **BATCH)
    assert after.shape[-1] == 105
    assert close(after[..., :99], before)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.config.text_config.vocab_size == 105


def gradients(model: Any, labels: Tensor, **given: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**given, labels=labels).loss
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = tiny_model().train()
    labels = BATCH["input_ids"].masked_fill(~BATCH["attention_mask"], -100)
    loss, expected = gradients(model, labels, **BATCH)
    assert {name.split(".")[1] for name in expected} >= {
        "vision_tower",
        "resampler",
        "language_model",
    }
    # transformers 5 renamed it on the way.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        # Re-entrant checkpointing needs an input that wants a gradient.
        model.enable_input_require_grads()
    again, found = gradients(model, labels, **BATCH)
    assert again == pytest.approx(loss)
    missing = expected.keys() - found.keys()
    # Pixels want no gradient, so that re-entrant checkpointing leaves the tower's blocks out.
    assert all("vision_tower" in name for name in missing) if reentrant else not missing
    for name in found:
        assert close(found[name], expected[name], 1e-4), name


def test_loss_is_the_shifted_cross_entropy() -> None:
    model = tiny_model()
    labels = BATCH["input_ids"].masked_fill(~BATCH["attention_mask"], -100)
    with torch.no_grad():
        output = model(**BATCH, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert float(output.loss.detach()) == pytest.approx(float(expected))


def test_hidden_states_and_kept_logits() -> None:
    model = tiny_model()
    with torch.no_grad():
        output = model(**BATCH, output_hidden_states=True, logits_to_keep=2)
    assert len(output.hidden_states) == 3 + 1
    assert model(**BATCH).hidden_states is None
    assert torch.equal(model.lm_head(output.hidden_states[-1][:, -2:]), output.logits)
    assert torch.equal(output.logits, logits_of(model, **BATCH)[:, -2:])


def test_parameters_of_the_3b_model_number_as_published() -> None:
    with torch.device("meta"):
        model = OpenFlamingoForConditionalGeneration(OpenFlamingoConfig())
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def total(part: str, without: str = "-") -> int:
        return sum(n for name, n in sizes.items() if part in name and without not in name)

    assert total("model.resampler.") == 63_019_008
    assert total(".cross_attention.") == 881_000_496
    assert total("embed_tokens") == 102_973_440
    assert (
        total("language_model.layers.", ".cross_attention.") + total("language_model.norm")
        == 1_208_158_208
    )
    # Without the projection of the pooled output, which this model does not have.
    assert total("model.vision_tower.") == 303_966_208 - 1024 * 768


def test_text_beyond_the_context_is_refused() -> None:
    with pytest.raises(UserError, match=r"65 tokens long.* context is 64"):
        tiny_model()(input_ids=torch.zeros(1, 65, dtype=torch.long))


def refusals() -> dict[str, tuple[dict[str, Any], str]]:
    ids, pixels = BATCH["input_ids"], BATCH["pixel_values"]
    cache = DynamicCache()
    cache.update(torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8), 0)
    features = torch.zeros(3, 1, 4, 32)
    return {
        "nothing": ({}, "input_ids or inputs_embeds"),
        "both": ({"input_ids": ids, "inputs_embeds": torch.zeros(1)}, "input_ids or inputs_embeds"),
        "frames": (
            {"input_ids": ids, "pixel_values": pixels[:, :, None]},
            "pixel_values has shape",
        ),
        "twice": (
            {"input_ids": ids, "pixel_values": pixels, "image_features": features},
            "not both",
        ),
        "no images": ({"input_ids": ids}, "holds <image> tokens, but no images"),
        "rows": ({"input_ids": ids, "pixel_values": pixels[:1]}, "3 rows of text and images for 1"),
        "unknown image": (
            {"input_ids": ids, "image_features": features, "past_key_values": cache},
            "media_index is needed",
        ),
        "mask": (
            {**BATCH, "attention_mask": BATCH["attention_mask"][:, 1:]},
            "attention_mask has shape",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    given, message = refusals()[name]
    with pytest.raises(ValueError, match=message):
        tiny_model()(**given)


def test_generation_refuses_places_without_images() -> None:
    given = {key: t for key, t in BATCH.items() if key != "pixel_values"}
    with pytest.raises(ValueError, match="holds <image> tokens, but no images"):
        generated(tiny_model(), given)


def test_generation_refuses_images_of_other_rows() -> None:
    given = {**BATCH, "pixel_values": BATCH["pixel_values"][:2]}
    with pytest.raises(ValueError, match="3 rows of text and images for 2"):
        generated(tiny_model(), given)


@pytest.mark.parametrize("penalty", [-2.0, 0.0, 1.0])
def test_released_beam_search_divides_by_the_whole_length(penalty: float) -> None:
    model, prompt = tiny_model(), BATCH["input_ids"].shape[1]
    options: dict[str, Any] = {"num_beams": 3, "length_penalty": penalty, "max_new_tokens": 4}
    options |= {"eos_token_id": END, "pad_token_id": PAD, "return_dict_in_generate": True}
    output = model.generate(**BATCH, **options, custom_generate=released_beam_search)
    new = output.sequences.shape[1] - prompt
    mask = torch.cat([BATCH["attention_mask"], torch.ones(3, new, dtype=torch.bool)], dim=1)
    given = {**BATCH, "input_ids": output.sequences, "attention_mask": mask}
    steps = logits_of(model, **given).log_softmax(-1)[:, prompt - 1 : -1]
    for row, score in enumerate(output.sequences_scores):
        ids = output.sequences[row, prompt:].tolist()
        ended = END in ids
        used = ids[: ids.index(END) + 1] if ended else ids
        total = sum(float(steps[row, place, token]) for place, token in enumerate(used))
        length = prompt + len(used) - int(ended)
        assert float(score) == pytest.approx(total / length**penalty, rel=1e-4)


def test_static_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="static cache is not supported"):
        generated(tiny_model(), BATCH, cache_implementation="static")


def test_going_on_from_a_cache_needs_the_whole_text() -> None:
    model = tiny_model()
    output = model(**BATCH, use_cache=True)
    with pytest.raises(ValueError, match="ids of the whole text"):
        model.prepare_inputs_for_generation(
            BATCH["input_ids"][:, -1:],
            past_key_values=output.past_key_values,
            image_features=EncodedImages(output.image_hidden_states),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "gpt_neox"}}, "RedPajama-INCITE"),
        ({"text_config": {"model_type": "mpt"}}, "drops the query and key norms"),
        ({"text_config": {"model_type": "llama"}}, "another kind of model"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({"cross_attention_every": 0}, "cross_attention_every is 0"),
        ({"text_config": {"hidden_size": 30, "num_attention_heads": 4}}, "does not divide"),
        ({"text_config": {"tie_word_embeddings": False}}, "tie_word_embeddings is false"),
    ],
)
def test_configurations_of_other_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OpenFlamingoConfig(**changes)


def test_parts_may_be_given_as_plain_settings() -> None:
    config: Any = OpenFlamingoConfig(
        vision_config={"hidden_size": 48}, text_config={"alibi": False}
    )
    assert isinstance(config.vision_config, CLIPVisionConfig)
    assert config.vision_config.hidden_size == 48
    assert config.text_config.alibi is False


def test_beams_share_the_reading_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    batch = tiny_batch()
    rows: list[tuple[int, int]] = []
    read = model.model.language_model.forward

    def spy(embedded: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append((embedded.shape[0], embedded.shape[1]))
        return read(embedded, *arguments, **options)

    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**batch, **options, use_cache=False)
    monkeypatch.setattr(model.model.language_model, "forward", spy)
    for settings in (options, {"generation_config": GenerationConfig(**options)}):
        rows.clear()
        assert torch.equal(model.generate(**batch, **settings), expected)
        examples, width = batch["input_ids"].shape
        assert rows[0] == (examples, width - 1)
        assert set(rows[1:]) == {(3 * examples, 1)}
