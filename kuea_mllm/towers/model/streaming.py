"""Run a tower block by block, each block's weights fetched when its turn comes.

For towers that lie on disk or are cast on the way: one block is held in float32 at a time (50 MB
of ViT-L), not the tower (1.2 GB).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.model.encode import normalise
from kuea_mllm.towers.model.tower import build_meta_model
from kuea_mllm.towers.spec import TowerSpec

_HEAD = "head."


@dataclass(frozen=True)
class Reading:
    """What is read of a tower.

    Attributes:
        layers: Indices into the hidden states, as in `TowerEncoder.features`; several are joined
            along the width.
        drops_cls: Whether the class token is left out.
        after_norm: Whether the final norm is applied.
    """

    layers: tuple[int, ...]
    drops_cls: bool
    after_norm: bool = False


@torch.no_grad()
def read_outputs(
    spec: TowerSpec,
    state: Mapping[str, Tensor],
    pixels01: Tensor,
    reading: Reading,
    *,
    wants_embedding: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the tokens that are read and the pooled embedding, in float32 on the CPU.

    Args:
        spec: Architecture and normalisation to run with.
        state: Weights under canonical names, any float dtype.
        pixels01: Images in [0, 1], (n, 3, image_size, image_size).
        reading: Which tokens.
        wants_embedding: Whether the embedding is needed.

    Returns:
        Tokens, (n, tokens, width * layers), and the embedding, (n, embedding_width): projected for
        CLIP, of the pooling head for SigLIP. None if not wanted or `state` holds neither.
    """
    # The names decide, because a base often keeps the body only.
    pools = wants_embedding and (
        keys.PROJECTION in state or any(n.startswith(_HEAD) for n in state)
    )
    model: Any = build_meta_model(spec)
    body = getattr(model, "vision_model", model)
    wanted = {layer % (spec.layers + 1) for layer in reading.layers}
    hidden = _embed(body, state, normalise(pixels01.to(torch.float32), spec.mean, spec.std))
    kept: dict[int, Tensor] = {}
    for index in range(spec.layers + 1):
        if index in wanted:
            kept[index] = _tokens(body, state, hidden, reading, spec)
        if index == spec.layers or (not pools and index >= max(wanted)):
            break
        block = body.encoder.layers[index]
        hidden = _call(block, state, f"{keys.HF_BLOCK}{index}.", hidden, None)
    tokens = torch.cat([kept[layer % (spec.layers + 1)] for layer in reading.layers], dim=-1)
    return tokens, _pool(model, body, state, hidden) if pools else None


def _embed(body: Any, state: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    positions = state["embeddings.position_embedding.weight"].shape[0]
    counter = {"position_ids": torch.arange(positions)[None]}
    hidden = _call(body.embeddings, state, "embeddings.", pixels, extra=counter)
    if hasattr(body, "pre_layrnorm"):
        hidden = _call(body.pre_layrnorm, state, "pre_layrnorm.", hidden)
    return hidden


def _tokens(
    body: Any, state: Mapping[str, Tensor], hidden: Tensor, reading: Reading, spec: TowerSpec
) -> Tensor:
    if reading.after_norm:
        hidden = _call(body.post_layernorm, state, "post_layernorm.", hidden)
    return hidden[:, spec.prefix_tokens :] if reading.drops_cls else hidden


def _pool(model: Any, body: Any, state: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    hidden = _call(body.post_layernorm, state, "post_layernorm.", hidden)
    if keys.PROJECTION in state:
        return _call(model.visual_projection, state, "visual_projection.", hidden[:, 0])
    return _call(body.head, state, _HEAD, hidden)


def _call(
    module: nn.Module,
    state: Mapping[str, Tensor],
    prefix: str,
    *inputs: Tensor | None,
    extra: Mapping[str, Tensor] | None = None,
) -> Tensor:
    weights = {
        name: state[prefix + name].detach().to("cpu", torch.float32)
        for name, _ in module.named_parameters()
    }
    result: Tensor = functional_call(module, {**weights, **(extra or {})}, inputs)
    return result
