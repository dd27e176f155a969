"""The perceiver resampler: 64 tokens out of the patch tokens of an image, whatever their number."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kuea_mllm.adapters.openflamingo.attention import FeedForward, attend, split_heads
from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig


class PerceiverAttention(nn.Module):
    """The latents look at the image and at themselves."""

    is_causal = False

    def __init__(self, config: OpenFlamingoConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.heads = config.resampler_heads
        inner = config.resampler_heads * config.resampler_head_dim
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.kv_proj = nn.Linear(width, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, latents: Tensor, media: Tensor) -> Tensor:
        """Return the change of the latents, (images, latents, width)."""
        latents = self.norm_latents(latents)
        # (images, patches + latents, 2 * inner), keys in the first half
        key_value = self.kv_proj(torch.cat([self.norm_media(media), latents], dim=1))
        key, value = (split_heads(part, self.heads) for part in key_value.chunk(2, dim=-1))
        query = split_heads(self.q_proj(latents), self.heads)
        output: Tensor = self.out_proj(attend(self, self.config, query, key, value, None))
        return output


class PerceiverLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """Attention and feed-forward, both added to the latents."""

    def __init__(self, config: OpenFlamingoConfig, width: int) -> None:
        super().__init__()
        self.attention = PerceiverAttention(config, width)
        self.mlp = FeedForward(width, config.resampler_ff_mult)

    def forward(self, latents: Tensor, media: Tensor) -> Tensor:
        """Return the latents after this layer, (images, latents, width)."""
        latents = latents + self.attention(latents, media)
        return cast(Tensor, latents + self.mlp(latents))


class PerceiverResampler(nn.Module):
    """Makes a fixed number of tokens of each image, independently of all others."""

    def __init__(self, config: OpenFlamingoConfig, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, width))
        self.layers = nn.ModuleList(
            PerceiverLayer(config, width) for _ in range(config.perceiver_depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, media: Tensor) -> Tensor:
        """Resample images.

        Args:
            media: Patch tokens, (images, patches, width).

        Returns:
            (images, latents, width).
        """
        latents = self.latents.to(media.dtype).expand(media.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, media)
        return cast(Tensor, self.norm(latents))
