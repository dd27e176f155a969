"""A layer of the MPT language model with the gated block in front of it.

transformers' own MPT cannot stand in: it has no query and key norms and drops their weights
without a word (fact sheet, trap 3).
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kuea_mllm.adapters.openflamingo.attention import attend, split_heads
from kuea_mllm.adapters.openflamingo.configuration import (
    OpenFlamingoConfig,
    OpenFlamingoTextConfig,
)
from kuea_mllm.adapters.openflamingo.cross_attention import GatedCrossAttention
from kuea_mllm.adapters.openflamingo.media import EncodedImages, MediaMask


class MptAttention(nn.Module):
    """Causal self-attention; queries and keys are normalised before the heads are split."""

    is_causal = False  # The mask says it.

    def __init__(self, config: OpenFlamingoConfig, layer: int) -> None:
        super().__init__()
        text: Any = config.text_config
        self.config = config
        self.layer = layer
        self.heads = text.num_attention_heads
        self.qkv_proj = nn.Linear(text.hidden_size, 3 * text.hidden_size, bias=False)
        self.out_proj = nn.Linear(text.hidden_size, text.hidden_size, bias=False)
        self.q_norm = mpt_norm(text) if text.qk_norm else None
        self.k_norm = mpt_norm(text) if text.qk_norm else None

    def forward(self, hidden_states: Tensor, bias: Tensor, past_key_values: Any) -> Tensor:
        """Return the change, (rows, positions, width)."""
        query, key, value = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)
        output: Tensor = self.out_proj(attend(self, self.config, query, key, value, bias))
        return output


class MptMLP(nn.Module):
    """Two layers without biases around an exact GELU."""

    def __init__(self, config: OpenFlamingoTextConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act = nn.GELU()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the change, (rows, positions, width)."""
        return cast(Tensor, self.down_proj(self.act(self.up_proj(hidden_states))))


class OpenFlamingoDecoderLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """A gated block, if one belongs here, and the language model's own layer."""

    def __init__(self, config: OpenFlamingoConfig, layer: int) -> None:
        super().__init__()
        text: Any = config.text_config
        vision: Any = config.vision_config
        self.cross_attention = (
            GatedCrossAttention(config, layer, text.hidden_size, vision.hidden_size)
            if has_cross_attention(config, layer)
            else None
        )
        self.norm_1 = mpt_norm(text)
        self.attention = MptAttention(config, layer)
        self.norm_2 = mpt_norm(text)
        self.mlp = MptMLP(text)

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor,
        tokens: Tensor | None,
        images: EncodedImages | None,
        mask: MediaMask | None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Return the stream after this layer, (rows, positions, width)."""
        if self.cross_attention is not None:
            hidden_states = self.cross_attention(hidden_states, tokens, images, mask)
        hidden_states = hidden_states + self.attention(
            self.norm_1(hidden_states), bias, past_key_values
        )
        return cast(Tensor, hidden_states + self.mlp(self.norm_2(hidden_states)))


def has_cross_attention(config: OpenFlamingoConfig, layer: int) -> bool:
    """Say whether a gated block precedes a decoder layer (numbers from 0)."""
    return (layer + 1) % config.cross_attention_every == 0


def mpt_norm(config: OpenFlamingoTextConfig) -> nn.LayerNorm:
    """Make a norm of the language model: a weight and no bias."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
