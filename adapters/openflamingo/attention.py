"""What the perceiver and the gated blocks share: projections without biases, feed-forward.

Sizes are independent of the stream's width here: 8 heads of 64 in all released models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend step by step, scores in float32.

    Args:
        module: Not used; part of transformers' attention interface.
        query: (batch, heads, queries, width).
        key: (batch, heads, keys, width).
        value: As `key`.
        attention_mask: Boolean (true where a query may look) or additive; broadcast over heads.
        scaling: Factor of the scores.

    Returns:
        (batch, queries, heads, width) and the weights.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
        else:
            scores = scores + attention_mask.float()
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attend(
    module: nn.Module,
    config: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Attend with the implementation that the configuration names.

    Args:
        module: The layer that attends; its `is_causal` must be false, as `mask` says everything.
        config: Configuration with `_attn_implementation` ("eager" or "sdpa").
        query: (batch, heads, queries, width).
        key: (batch, heads, keys, width).
        value: As `key`.
        mask: Boolean or additive mask, or None.

    Returns:
        (batch, queries, heads * width).
    """
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager_attention
    )
    output: Tensor = implementation(
        module, query, key, value, mask, scaling=query.shape[-1] ** -0.5
    )[0]
    return output.flatten(-2)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """Turn (batch, length, heads * width) into (batch, heads, length, width)."""
    batch, length, _ = states.shape
    return states.view(batch, length, heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """LayerNorm, then two layers without biases around an exact GELU.

    Args:
        width: Width of input and output.
        mult: Hidden width in units of `width`.
        eps: Of the norm.
    """

    def __init__(self, width: int, mult: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.up_proj = nn.Linear(width, width * mult, bias=False)
        self.act = nn.GELU()
        self.down_proj = nn.Linear(width * mult, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the change, (..., width); the caller adds it."""
        output: Tensor = self.down_proj(self.act(self.up_proj(self.norm(hidden_states))))
        return output
