"""What reads classes off frozen tokens: the heads of the patch probing benchmark (Covert et al.).

A local head answers for every patch, a global one for the whole picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HeadKind = Literal["transformer", "linear", "mlp"]
Task = Literal["local", "global"]

_LAYER_SCALE = 0.01
_POSITION_SCALE = 0.02
_MLP_WIDTH = 1024


@dataclass(frozen=True)
class TokenShape:
    """What a head has to know of the tokens it reads.

    Attributes:
        width: Width of a token.
        heads: Attention heads of the tower, which a transformer head has as well.
        prefix: Tokens before the patches.
        patches: Tokens of patches.
    """

    width: int
    heads: int
    prefix: int
    patches: int


def make_head(
    kind: HeadKind, task: Task, shape: TokenShape, classes: int, *, seed: int, layers: int = 2
) -> nn.Module:
    """Build a head with random weights of its own, whatever else is built before or after.

    Args:
        kind: "transformer" (the benchmark's), "linear" or "mlp" (1024 wide).
        task: "local" answers for every patch, "global" for the picture.
        shape: Of the tokens.
        classes: Number of answers.
        seed: Of the weights.
        layers: Blocks of a transformer.

    Returns:
        A module from tokens (n, prefix + patches, width) to logits, (n, patches, classes) or
        (n, 1, classes).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "transformer":
            return TransformerHead(task, shape, classes, layers)
        if kind == "mlp":
            inside: nn.Module = nn.Sequential(
                nn.Linear(shape.width, _MLP_WIDTH), nn.GELU(), nn.Linear(_MLP_WIDTH, classes)
            )
        else:
            inside = nn.Linear(shape.width, classes)
        return TokenwiseHead(task, shape, inside)


class TokenwiseHead(nn.Module):
    """Answers from each token alone; the global one from the class token, or the mean of all."""

    def __init__(self, task: Task, shape: TokenShape, inside: nn.Module) -> None:
        super().__init__()
        self.task, self.shape, self.inside = task, shape, inside

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits; see `make_head`."""
        answer: Tensor = self.inside(_chosen(tokens, self.task, self.shape))
        return answer


class TransformerHead(nn.Module):
    """Positions, LayerNorm, pre-norm blocks, LayerNorm and a linear layer, over all tokens."""

    def __init__(self, task: Task, shape: TokenShape, classes: int, layers: int) -> None:
        super().__init__()
        self.task, self.shape = task, shape
        tokens = shape.prefix + shape.patches
        self.positions = nn.Parameter(_POSITION_SCALE * torch.randn(tokens, shape.width))
        self.norm_before = nn.LayerNorm(shape.width)
        self.blocks = nn.Sequential(*(Block(shape.width, shape.heads) for _ in range(layers)))
        self.norm_after = nn.LayerNorm(shape.width)
        self.classifier = nn.Linear(shape.width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits; see `make_head`."""
        mixed = self.norm_after(self.blocks(self.norm_before(tokens + self.positions)))
        # The last layer is linear: averaging before it is averaging what it says.
        answer: Tensor = self.classifier(_chosen(mixed, self.task, self.shape))
        return answer


class Block(nn.Module):
    """A pre-norm transformer block: no bias on queries, keys and values, LayerScale 0.01."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)
        self.scale_attention = nn.Parameter(torch.full((width,), _LAYER_SCALE))
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale_mlp = nn.Parameter(torch.full((width,), _LAYER_SCALE))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape, (n, tokens, width)."""
        tokens = tokens + self.scale_attention * self._attend(self.norm_attention(tokens))
        changed: Tensor = tokens + self.scale_mlp * self.mlp(self.norm_mlp(tokens))
        return changed

    def _attend(self, tokens: Tensor) -> Tensor:
        count, length, width = tokens.shape
        parts = self.queries_keys_values(tokens).view(count, length, 3, self.heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)  # (n, heads, tokens, width / heads)
        mixed = scaled_dot_product_attention(queries, keys, values)
        answer: Tensor = self.output(mixed.transpose(1, 2).reshape(count, length, width))
        return answer


def _chosen(tokens: Tensor, task: Task, shape: TokenShape) -> Tensor:
    """Return the tokens that a task reads: (n, patches, width) or (n, 1, width)."""
    if task == "local":
        return tokens[:, shape.prefix :]
    return tokens[:, : shape.prefix or None].mean(1, keepdim=True)
