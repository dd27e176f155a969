"""Attention maps of one layer, against the eager attention of transformers and of PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tower_samples import CLIP, SIGLIP, make_tower

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.model.attention import attention_maps
from kuea_mllm.towers.model.encode import normalise
from kuea_mllm.towers.model.tower import Tower, build_meta_model
from kuea_mllm.towers.spec import TowerSpec

WIDE = replace(CLIP, heads=4, image_size=32)
WIDE_SIGLIP = replace(SIGLIP, heads=4, image_size=32)


def sharp_tower(spec: TowerSpec, **options: Any) -> Tower:
    """Return a tower whose attention is far from uniform."""
    tower = make_tower(spec, **options)
    with torch.no_grad():
        for name, parameter in tower.model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(2)
            if name.endswith("head.attention.in_proj_weight"):
                parameter.mul_(4)
    return tower


def pixels_of(spec: TowerSpec) -> torch.Tensor:
    return torch.rand(3, 3, spec.image_size, spec.image_size)


def eager_attentions(tower: Tower, pixels: torch.Tensor) -> Any:
    model: Any = tower.model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        given = normalise(pixels, tower.spec.mean, tower.spec.std)
        found = model(pixel_values=given, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
@pytest.mark.parametrize("with_projection", [True, False])
def test_class_attention_is_the_eager_one(layer: int, with_projection: bool) -> None:
    tower = sharp_tower(WIDE, with_projection=with_projection)
    pixels = pixels_of(WIDE)
    expected = eager_attentions(tower, pixels)[layer][:, :, 0, 1:]
    found = attention_maps(tower, pixels, layer=layer)
    assert found.shape == (3, 4, 4, 4)
    assert float((found.flatten(2) - expected).abs().max()) < 1e-6
    assert float(expected.std()) > 1e-2
    assert float(found.sum((2, 3)).max()) < 1


def test_siglip_map_is_the_attention_of_its_pooling_probe() -> None:
    tower = sharp_tower(WIDE_SIGLIP)
    pixels = pixels_of(WIDE_SIGLIP)
    model: Any = tower.model
    with torch.no_grad():
        tokens = model(normalise(pixels, WIDE_SIGLIP.mean, WIDE_SIGLIP.std)).last_hidden_state
        body = getattr(model, "vision_model", model)
        _, expected = body.head.attention(
            body.head.probe.repeat(3, 1, 1), tokens, tokens, average_attn_weights=False
        )
    found = attention_maps(tower, pixels)
    assert found.shape == (3, 4, 4, 4)
    assert float((found.flatten(2) - expected[:, :, 0]).abs().max()) < 1e-6
    assert float(expected.std()) > 1e-2
    torch.testing.assert_close(found.sum((2, 3)), torch.ones(3, 4))
    with pytest.raises(TowerError, match="no block 0"):
        attention_maps(tower, pixels, layer=0)


def test_model_is_left_as_it_was() -> None:
    tower = make_tower(WIDE)
    attention_maps(tower, pixels_of(WIDE))
    assert not any(module._forward_hooks for module in tower.model.modules())
    assert tower.model.config._attn_implementation == "sdpa"
    with pytest.raises(TowerError, match="has 2 blocks, so there is no block 2"):
        attention_maps(tower, pixels_of(WIDE), layer=2)


def test_half_precision_towers_give_float32_maps() -> None:
    tower, pixels = sharp_tower(WIDE), pixels_of(WIDE)
    expected = attention_maps(tower, pixels)
    tower.model.to(torch.bfloat16)
    found = attention_maps(tower, pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_meta_model_has_the_towers_shapes_and_no_memory(spec: TowerSpec) -> None:
    real = make_tower(spec).model
    meta = build_meta_model(spec)
    tensors = [*meta.parameters(), *meta.buffers()]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
    shapes = {name: tensor.shape for name, tensor in meta.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in real.state_dict().items()}
    if spec.family == "clip":
        bare = build_meta_model(spec, has_projection=False)
        assert "visual_projection.weight" not in bare.state_dict()


def test_meta_model_of_the_largest_tower_is_counted_at_once() -> None:
    spec = replace(
        SIGLIP,
        image_size=224,
        patch_size=14,
        width=1152,
        layers=27,
        heads=16,
        mlp_width=4304,
        embedding_width=1152,
        activation="gelu_pytorch_tanh",
    )
    count = sum(parameter.numel() for parameter in build_meta_model(spec).parameters())
    block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    head = 1152 + 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 2 * 1152
    assert count == 27 * block + (3 * 14 * 14 + 1 + 256) * 1152 + 2 * 1152 + head
