"""The table of taps against what the projectors of transformers' classes really get."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hf_vlm_samples import CONFIGS, clip, llama, make_model, write_directory
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from kuea_mllm.adapters.base import Tap
from kuea_mllm.adapters.hf_vlm.adapter import HFVLMAdapter
from kuea_mllm.adapters.hf_vlm.readers import READERS
from kuea_mllm.adapters.hf_vlm.structure import find_tower

ADAPTER = HFVLMAdapter()


def tokens_of(tower: Any, tap: Tap, pixels: Tensor) -> list[Tensor]:
    states = tower(pixels, output_hidden_states=True).hidden_states
    tokens = []
    for layer in tap.layers:
        state = tower.post_layernorm(states[layer]) if tap.after_norm else states[layer]
        tokens.append(state[:, 1:] if tap.drops_cls else state)
    return tokens


def inputs_of_projector(holder: nn.Module, name: str, pixels: Tensor) -> list[Tensor]:
    """Run the class's own code and catch the tokens on the way into each of its projectors."""
    caught: list[Tensor] = []
    projector = holder.get_submodule(name)
    modules = list(projector) if isinstance(projector, nn.ModuleList) else [projector]
    if hasattr(holder, "spatial_projectors"):
        modules.append(holder.get_submodule("spatial_projectors.0"))
    handles = [m.register_forward_pre_hook(lambda _, a: caught.append(a[0])) for m in modules]
    reader: Any = holder
    options: dict[str, Any] = {}
    if hasattr(reader.config, "image_grid_pinpoints"):
        # Three tiles: the whole image and its two halves.
        options, pixels = {"image_sizes": torch.tensor([[16, 32]])}, pixels[None]
    elif "VBert" in type(holder).__name__:
        pixels = pixels[None]
    elif "Hybrid" in type(holder).__name__:
        options = {"high_res_pixel_values": torch.zeros(len(pixels), 3, 32, 32)}
    reader.get_image_features(pixels, **options)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_tap_is_what_the_projector_gets(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    slot = ADAPTER.tower_slot(write_directory(model, tmp_path / "base"))
    assert slot.tap is not None
    found = find_tower(model, name)
    reader = READERS[type(found.holder).__name__]
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    projector = reader.projector(cast(PreTrainedModel, found.holder).config)
    caught = inputs_of_projector(found.holder, projector.weight.split(".")[0], pixels)
    tokens = tokens_of(found.module, slot.tap, pixels)
    expected = tokens if len(caught) > 1 else [torch.cat(tokens, dim=-1)]
    assert len(caught) == len(expected)
    for one, other in zip(caught, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert slot.projector_width == found.module.config.hidden_size


def test_every_entry_of_the_table_is_tested() -> None:
    tested = {type(find_tower(make_model(name), name).holder).__name__ for name in CONFIGS}
    assert tested == set(READERS)


@pytest.mark.parametrize(
    ("strategy", "layers"), [("default", -2), ("full", -1), ("default", [1, -2])]
)
@torch.no_grad()
def test_tap_follows_the_configuration(tmp_path: Path, strategy: str, layers: Any) -> None:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=340,
        vision_feature_layer=layers,
        vision_feature_select_strategy=strategy,
    )
    model: Any = LlavaForConditionalGeneration(config)
    slot = ADAPTER.tower_slot(write_directory(model, tmp_path / "base"))
    wanted = (layers,) if isinstance(layers, int) else tuple(layers)
    assert slot.tap == Tap(wanted, drops_cls=strategy == "default")
    pixels = torch.randn(2, 3, 16, 16)
    caught = inputs_of_projector(model.model, "multi_modal_projector", pixels)
    expected = torch.cat(tokens_of(model.model.vision_tower, slot.tap, pixels), dim=-1)
    torch.testing.assert_close(caught[0], expected, rtol=0, atol=1e-5)
    assert slot.projector_width == 16
