"""The gated block in front of a decoder layer, through which the text sees images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.openflamingo.attention import FeedForward, attend, split_heads
from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig
from kuea_mllm.adapters.openflamingo.media import EncodedImages, KeyValue, MediaMask


class MediaAttention(nn.Module):
    """Text looks at the latents of its image; the latents are not normalised again."""

    is_causal = False

    def __init__(self, config: OpenFlamingoConfig, width: int, media_width: int) -> None:
        super().__init__()
        self.config = config
        self.heads = config.cross_attention_heads
        inner = config.cross_attention_heads * config.cross_attention_head_dim
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.kv_proj = nn.Linear(media_width, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def project(self, tokens: Tensor) -> KeyValue:
        """Return keys and values of latents, each (examples, heads, tokens, width of a head)."""
        key, value = self.kv_proj(tokens).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, hidden_states: Tensor, key_value: KeyValue, mask: MediaMask) -> Tensor:
        """Return the change before its gate, (rows, positions, width)."""
        key, value = key_value
        rows, positions, _ = hidden_states.shape
        examples = key.shape[0]
        query = split_heads(self.q_proj(self.norm(hidden_states)), self.heads)
        query = query.masked_fill(mask.sees_mean, 0.0)
        visible = mask.visible
        if rows != examples:
            # Rows of one example (beams) share its latents: to those they are further positions.
            query = _join_rows(query, examples)
            visible = _join_rows(visible, examples)
        output = attend(self, self.config, query, key, value, visible).view(rows, positions, -1)
        change: Tensor = self.out_proj(output.masked_fill(mask.sees_nothing, 0.0))
        return change


class GatedCrossAttention(nn.Module):
    """Attention to images and a feed-forward, each behind a tanh gate that starts closed.

    Args:
        config: The whole model's configuration.
        layer: Number of the decoder layer that follows.
        width: Width of the text stream.
        media_width: Width of the latents.
    """

    def __init__(
        self, config: OpenFlamingoConfig, layer: int, width: int, media_width: int
    ) -> None:
        super().__init__()
        self.layer = layer
        self.attention = MediaAttention(config, width, media_width)
        self.attention_gate = nn.Parameter(torch.empty(1))
        self.mlp = FeedForward(width, config.cross_attention_ff_mult)
        self.mlp_gate = nn.Parameter(torch.empty(1))

    def forward(
        self,
        hidden_states: Tensor,
        tokens: Tensor | None,
        images: EncodedImages | None,
        mask: MediaMask | None,
    ) -> Tensor:
        """Return the text stream after this block.

        Args:
            hidden_states: (rows, positions, width).
            tokens: The latents of `images` as a tensor of their own, (examples, tokens, width), so
                that gradient checkpointing sees them; None without images.
            images: Keeps keys and values between decoding steps.
            mask: What each position sees; None without images.
        """
        if tokens is not None and images is not None and mask is not None:
            attention = self.attention
            key_value = images.key_value(self.layer, lambda: attention.project(tokens))
            change = attention(hidden_states, key_value, mask)
            hidden_states = hidden_states + self.attention_gate.tanh() * change
        # Without an image the feed-forward still acts.
        output: Tensor = hidden_states + self.mlp_gate.tanh() * self.mlp(hidden_states)
        return output


def _join_rows(states: Tensor, examples: int) -> Tensor:
    """Turn (rows, heads, positions, width) into (examples, heads, rows' positions, width)."""
    rows, heads, positions, width = states.shape
    grouped = states.view(examples, rows // examples, heads, positions, width)
    return grouped.transpose(1, 2).reshape(examples, heads, -1, width)
