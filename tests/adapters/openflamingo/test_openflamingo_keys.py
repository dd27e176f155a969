"""The table of names against the released layout as the fact sheet lists it."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_flamingo import tiny_config

from kuea_mllm.adapters.openflamingo import keys, released
from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
from kuea_mllm.errors import UserError


def our_names(config: OpenFlamingoConfig) -> set[str]:
    with torch.device("meta"):
        return {name for name, _ in OpenFlamingoForConditionalGeneration(config).named_parameters()}


@pytest.mark.parametrize("every", [1, 2, 3])
def test_names_are_one_to_one_and_complete(every: int) -> None:
    config = tiny_config(cross_attention_every=every)
    names = keys.checkpoint_names(
        perceiver_depth=config.perceiver_depth, gated_layers=released.gated_layers(config)
    ) | keys.language_model_names(layers=3, qk_norm=True)
    assert len(set(names.values())) == len(names)
    tower = {name for name in our_names(config) if name.startswith(keys.TOWER_PREFIX)}
    assert set(names.values()) | tower == our_names(config)


def test_3b_checkpoint_has_the_published_number_of_tensors() -> None:
    names = keys.checkpoint_names(perceiver_depth=6, gated_layers=range(24))
    assert sum(name.startswith("perceiver.") for name in names) == 69
    gated = [name for name in names if ".gated_cross_attn_layer." in name]
    assert len(gated) == 24 * 11
    assert keys.RELEASED_EMBEDDING == "lang_encoder.transformer.wte.weight"
    assert len(names) == 69 + len(gated) + 1
    assert not any(re.search(r"decoder_layer|ln_f|vision_encoder", name) for name in names)
    assert keys.perceiver_depth_of(names) == 6
    assert keys.gated_layers_of(names) == list(range(24))


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (4, [3])])
def test_gated_blocks_stand_where_the_original_puts_them(every: int, layers: list[int]) -> None:
    text = tiny_config().text_config.to_dict() | {"num_hidden_layers": 5}
    config = tiny_config(cross_attention_every=every, text_config=text)
    assert released.gated_layers(config) == layers
    pattern = r"language_model\.layers\.(\d+)\.cross_attention\.mlp_gate"
    built = [int(found[1]) for name in our_names(config) if (found := re.search(pattern, name))]
    assert sorted(built) == layers


def test_refusal_lists_both_sides() -> None:
    with pytest.raises(UserError, match=r"lacks tensors, 1 of them, such as b;.*unknown.* as c"):
        keys.check_names(["a", "c"], ["a", "b"], "the file")
    keys.check_names(["a", "b"], ["b", "a"], "the file")
