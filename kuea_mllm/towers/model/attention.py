"""Where a tower looks: attention of its class token, or of SigLIP's pooling probe, to the patches.

Only the queries and keys of one layer are caught and multiplied; the model itself runs unchanged
with its fused attention, which returns no weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.model.encode import normalise
from kuea_mllm.towers.model.tower import Tower


@torch.no_grad()
def attention_maps(tower: Tower, pixels01: Tensor, *, layer: int = -1) -> Tensor:
    """Return how much attention each patch gets.

    Args:
        tower: The tower.
        pixels01: Images in [0, 1], (n, 3, image_size, image_size), on the tower's device.
        layer: For CLIP, the block whose class token is asked, from 0 or from the end; SigLIP
            has no class token, its pooling head's probe is asked and only -1 is possible.

    Returns:
        Attention weights, (n, heads, grid, grid), float32 (float64 for such a tower). A map sums to
        one less what the class token gives to itself; SigLIP's sum to one.

    Raises:
        TowerError: If there is no such layer.
    """
    spec = tower.spec
    weight = next(tower.model.parameters())
    wide = torch.promote_types(weight.dtype, torch.float32)
    pixels = normalise(pixels01.to(wide), spec.mean, spec.std).to(weight.dtype)
    if spec.family == "siglip":
        query, key = _probe_query_and_key(tower, pixels, layer)
    else:
        query, key = _class_query_and_key(tower, pixels, layer)
    heads, width = spec.heads, spec.width // spec.heads
    query = query.view(len(query), -1, heads, width).transpose(1, 2)  # (n, heads, 1, width)
    key = key.view(len(key), -1, heads, width).transpose(1, 2)  # (n, heads, tokens, width)
    scores = query.to(wide) @ key.to(wide).transpose(2, 3) * width**-0.5
    weights: Tensor = scores.softmax(-1)[:, :, 0, spec.prefix_tokens :]  # (n, heads, patches)
    return weights.reshape(len(pixels), heads, spec.grid, spec.grid)


def _class_query_and_key(tower: Tower, pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    count = tower.spec.layers
    if not -count <= layer < count:
        raise TowerError(f"{tower.source} has {count} blocks, so there is no block {layer}.")
    body: Any = getattr(tower.model, "vision_model", tower.model)
    attention = body.encoder.layers[layer].self_attn
    caught = _catch_outputs([attention.q_proj, attention.k_proj], tower, pixels)
    return caught[0][:, :1], caught[1]


def _probe_query_and_key(tower: Tower, pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    if layer != -1:
        raise TowerError(
            f"{tower.source} is a SigLIP tower without class token: there is no block {layer} to "
            "ask.",
            "Take layer -1, its pooling head.",
        )
    model: Any = tower.model
    body = getattr(model, "vision_model", model)
    (tokens,) = _catch_outputs([body.post_layernorm], tower, pixels)
    attention, width = body.head.attention, tower.spec.width
    weights, biases = attention.in_proj_weight, attention.in_proj_bias
    probe = body.head.probe.expand(len(tokens), -1, -1)
    query = nn.functional.linear(probe, weights[:width], biases[:width])
    parts = slice(width, 2 * width)
    key = nn.functional.linear(tokens, weights[parts], biases[parts])
    return query, key


def _catch_outputs(modules: list[nn.Module], tower: Tower, pixels: Tensor) -> list[Tensor]:
    caught: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            del module, inputs
            caught[index] = output

        return hook

    hooks = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    try:
        tower.model(pixel_values=pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[index] for index in range(len(modules))]
