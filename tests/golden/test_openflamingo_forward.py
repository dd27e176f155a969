"""Forward passes of OpenFlamingo against the original (see openflamingo/index.json)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from openflamingo_golden import (
    TOLERANCE,
    build_model,
    case,
    cases_with,
    golden_model,
    golden_tower,
    index,
    pixels,
    tensors,
    worst,
)
from torch import Tensor, nn

from kuea_mllm.adapters.openflamingo.media import media_index

CONFIG: dict[str, Any] = index()["config"]
CASES = cases_with("logits")
TRAPS = tensors("traps.safetensors")


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, Tensor]]:
    """Collect the states inside the model under the golden's names."""
    found: dict[str, Tensor] = {}

    def record(module: nn.Module, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            found[name] = output

        return module.register_forward_hook(hook)

    text = model.model.language_model
    handles = [record(text.embed_tokens, "lm_embed"), record(text.norm, "final_norm")]
    for number, layer in enumerate(text.layers):
        handles.append(record(layer, f"after_block_{number}"))
        if layer.cross_attention is not None:
            handles.append(record(layer.cross_attention, f"after_xattn_{number}"))
            handles.append(record(layer.cross_attention.attention, f"xattn_raw_{number}"))
    for number, layer in enumerate(model.model.resampler.layers):
        handles.append(record(layer, f"perceiver_latents_{number}"))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: Any, name: str, *, masked: bool = True) -> Any:
    given = case(name)
    return model(
        input_ids=given["input_ids"],
        pixel_values=pixels(given["pixel_values"]).to(model.dtype),
        attention_mask=given["attention_mask"] if masked else None,
    )


def test_configuration_is_that_of_the_original() -> None:
    config: Any = golden_model().config
    text, vision = config.text_config, config.vision_config
    language, perceiver = CONFIG["language_model"], CONFIG["perceiver"]
    assert (text.hidden_size, text.num_attention_heads) == (
        language["d_model"],
        language["n_heads"],
    )
    assert text.num_hidden_layers == language["n_layers"]
    assert text.intermediate_size == language["mlp_ratio"] * language["d_model"]
    assert text.max_position_embeddings == language["max_seq_len"]
    assert text.vocab_size == CONFIG["embedding_rows_after_resize"]
    assert config.cross_attention_every == CONFIG["cross_attn_every_n_layers"]
    assert config.perceiver_depth == perceiver["depth"]
    assert config.num_latents == perceiver["num_latents"]
    assert config.resampler_heads == perceiver["heads"]
    assert config.resampler_head_dim == perceiver["dim_head"]
    assert config.resampler_ff_mult == perceiver["ff_mult"]
    assert config.cross_attention_heads == CONFIG["cross_attention"]["heads"]
    assert config.cross_attention_head_dim == CONFIG["cross_attention"]["dim_head"]
    assert config.cross_attention_ff_mult == CONFIG["cross_attention"]["ff_mult"]
    assert vision.hidden_size == CONFIG["vision"]["width"]
    assert vision.num_hidden_layers == CONFIG["vision"]["layers"]
    assert vision.hidden_act == golden_tower().spec.activation


@pytest.mark.parametrize("name", cases_with("vision_tokens"))
@torch.no_grad()
def test_vision_tokens_equal_the_original(name: str) -> None:
    given, model = case(name), golden_model()
    images = pixels(given["pixel_values"])
    tokens = model.model.vision_tower(images.flatten(0, 1)).last_hidden_state[:, 1:]
    assert worst(tokens.view_as(given["vision_tokens"]), given["vision_tokens"]) <= TOLERANCE


@pytest.mark.parametrize("name", cases_with("vision_pooled"))
@torch.no_grad()
def test_pooled_output_of_the_tower_equals_the_original(name: str) -> None:
    given, tower = case(name), golden_tower().model
    images = pixels(given["pixel_values"]).flatten(0, 1)
    assert worst(tower(images).image_embeds, given["vision_pooled"]) <= TOLERANCE


@pytest.mark.parametrize("name", cases_with("perceiver_out"))
@torch.no_grad()
def test_resampler_equals_the_original(name: str) -> None:
    given = case(name)
    found = golden_model().encode_images(pixels(given["pixel_values"]))
    assert worst(found, given["perceiver_out"]) <= TOLERANCE


@pytest.mark.parametrize("name", cases_with("media_index"))
def test_media_index_equals_the_original(name: str) -> None:
    given = case(name)
    found = media_index(given["input_ids"], CONFIG["ids"]["<image>"])
    assert torch.equal(found, given["media_index"])


@pytest.mark.parametrize("name", CASES)
def test_every_state_equals_the_original(name: str) -> None:
    given = case(name)
    with recorded(golden_model()) as found:
        output = run(golden_model(), name)
    found["logits"] = output.logits
    inputs = {"input_ids", "attention_mask", "pixel_values", "media_index"}
    tested = {"perceiver_out", "vision_tokens", "vision_pooled", "logits_no_attention_mask"}
    expected = {key for key in given if not key.endswith("_f64")} - inputs - tested
    assert expected <= found.keys(), expected - found.keys()
    for key in sorted(expected):
        state = found[key].view_as(given[key])
        where = None if key.startswith("perceiver") else given["attention_mask"]
        assert worst(state, given[key], where) <= TOLERANCE, key


@pytest.mark.parametrize("name", cases_with("logits_f64"))
def test_double_precision_equals_the_original(name: str) -> None:
    given, model = case(name), build_model().double()
    with recorded(model) as found:
        output = run(model, name)
    found["logits"], found["perceiver_out"] = output.logits, output.image_hidden_states
    for key in [key for key in given if key.endswith("_f64")]:
        state = found[key.removesuffix("_f64")]
        where = None if key.startswith("perceiver") else given["attention_mask"]
        assert worst(state, given[key], where) <= 1e-9, key


@pytest.mark.parametrize("name", cases_with("logits_no_attention_mask"))
def test_without_a_mask_padding_is_attended_to(name: str) -> None:
    given, logits = case(name), run(golden_model(), name, masked=False).logits
    assert worst(logits, given["logits_no_attention_mask"]) <= TOLERANCE
    assert worst(logits, given["logits"], given["attention_mask"]) > 10 * TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_equal_the_original(implementation: str) -> None:
    model = build_model()
    model.set_attn_implementation(implementation)
    for name in CASES:
        given = case(name)
        assert worst(run(model, name).logits, given["logits"], given["attention_mask"]) <= TOLERANCE


# What one gets by each known mistake; the ones that a setting can imitate are imitated.
MISTAKES: dict[str, dict[str, Any]] = {
    "trap.fewshot.logits_attending_to_all_previous_images": {"only_attend_immediate_media": False},
    "trap.single.logits_tower_with_exact_gelu": {"vision_config__hidden_act": "gelu"},
    "trap.single.logits_without_alibi": {"text_config__alibi": False},
    "trap.single.logits_without_qk_layernorm": {"text_config__qk_norm": False},
}


@pytest.mark.parametrize("trap", [name for name in TRAPS if ".logits_" in name])
def test_a_known_mistake_is_told_apart(trap: str) -> None:
    name = trap.split(".")[1]
    mask = case(name)["attention_mask"]
    wrong = TRAPS[trap]
    assert worst(run(golden_model(), name).logits, wrong, mask) > 10 * TOLERANCE
    if trap in MISTAKES:
        mistaken = run(build_model(**MISTAKES[trap]), name).logits
        assert worst(mistaken, wrong, mask) <= TOLERANCE


@torch.no_grad()
def test_tokens_behind_the_final_norm_are_told_apart() -> None:
    wrong = TRAPS["trap.single.vision_tokens_after_ln_post"]
    tower: Any = golden_model().model.vision_tower
    states = tower(pixels(case("single")["pixel_values"]).flatten(0, 1)).last_hidden_state
    tokens = tower.post_layernorm(states)[:, 1:].view_as(wrong)
    assert worst(tokens, wrong) <= TOLERANCE
    assert worst(states[:, 1:].view_as(wrong), wrong) > 10 * TOLERANCE


@torch.no_grad()
def prefilled() -> Any:
    return golden_model()(
        input_ids=case("fewshot")["input_ids"],
        pixel_values=pixels(case("fewshot")["pixel_values"]),
        attention_mask=case("fewshot")["attention_mask"],
        use_cache=True,
    )


def released_media_index(
    seen: Tensor, new_ids: Tensor, image_token_id: int
) -> tuple[Tensor, Tensor]:
    """Continue a text as the original does, whose bookkeeping restarts with a generated `<image>`.

    As soon as one row's new ids hold an `<image>`, the original forgets the counts of all rows, so
    that the others see no image from there on.
    """
    if (new_ids == image_token_id).any():
        index = media_index(new_ids, image_token_id)
        return index, index[:, -1]
    return seen[:, None].expand_as(new_ids), seen


@torch.no_grad()
def step_by_step(new_ids: Tensor, *, masked: bool) -> Tensor:
    """Feed ids one at a time as the original does, its bookkeeping of images included."""
    prefill, prompt = prefilled(), case("fewshot")
    image = CONFIG["ids"]["<image>"]
    seen = (prompt["input_ids"] == image).sum(dim=1)
    mask, logits = prompt["attention_mask"], []
    for column in new_ids.split(1, dim=1):
        index, seen = released_media_index(seen, column, image)
        mask = torch.cat([mask, torch.ones_like(column, dtype=torch.bool)], dim=1)
        output = golden_model()(
            input_ids=column,
            image_features=prefill.image_hidden_states,
            media_index=index,
            attention_mask=mask if masked else None,
            past_key_values=prefill.past_key_values,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def test_cache_of_the_prompt_equals_the_original() -> None:
    layers = prefilled().past_key_values.layers
    expected = {key: t for key, t in case("cached").items() if key.startswith("prefill_")}
    assert expected
    for name, tensor in expected.items():
        _, what, number = name.split("_")
        layer = layers[int(number)]
        states = {"key": layer.keys, "value": layer.values}[what]
        assert worst(states.transpose(1, 2).flatten(2), tensor) <= TOLERANCE, name


@pytest.mark.parametrize("masked", [True, False])
def test_cached_steps_equal_the_original(masked: bool) -> None:
    expected = case("cached")["step_logits_masked" if masked else "step_logits_no_mask"]
    assert worst(step_by_step(case("cached")["new_ids"], masked=masked), expected) <= TOLERANCE


def test_a_generated_image_token_resets_the_batch_as_in_the_original() -> None:
    given = case("imgtok")
    found = step_by_step(given["new_ids"], masked=True)
    assert worst(found, given["step_logits_masked"]) <= TOLERANCE


@torch.no_grad()
def test_new_ids_alone_see_the_last_cached_image() -> None:
    given, prompt = case("cached"), case("fewshot")
    seen = (prompt["input_ids"] == CONFIG["ids"]["<image>"]).sum(dim=1)
    logits = golden_model()(
        input_ids=given["new_ids"],
        pixel_values=pixels(prompt["pixel_values"]),
        media_index=seen[:, None].expand_as(given["new_ids"]),
    ).logits
    assert worst(logits, given["logits_new_ids_only"]) <= TOLERANCE
