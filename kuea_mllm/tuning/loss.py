"""Cross-entropy where something is to be predicted, without the logits of a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_IGNORED = -100


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a next token is to be predicted, and which.

    Args:
        labels: (rows, tokens), -100 where nothing is learned.

    Returns:
        Positions in the flattened hidden states, (n,), and target tokens, (n,). The first token of
        a row is predicted by nothing.
    """
    rows, tokens = labels.shape
    targets = labels[:, 1:]
    is_learned = targets != _IGNORED
    places = torch.arange(rows * tokens).view(rows, tokens)[:, :-1]
    return places[is_learned], targets[is_learned]


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk: int
) -> Tensor:
    """Return the sum of the cross-entropies of all positions, a float32 scalar.

    Logits of one chunk are held at a time and computed again in the backward pass: 2048 positions
    of LLaVA's vocabulary would be 262 MB in float32, and as much again for the gradient.

    Args:
        hidden: What the output layer reads, (n, width).
        weight: Of the output layer, (vocabulary, width); its other rows are left out by the caller.
        bias: (vocabulary,), or None.
        targets: (n,), int64.
        chunk: Positions at once.
    """
    if not len(targets):
        # Still a function of the model, so that all processes go through the same backward pass;
        # of the output layer too, which may train.
        nothing = hidden.float().sum() + weight[:1].float().sum()
        return (nothing if bias is None else nothing + bias[:1].float().sum()) * 0.0
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        total = total + checkpoint(
            _cross_entropy,
            hidden[rows],
            weight,
            bias,
            targets[rows],
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


def _cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    # As the original: logits in the model's precision, the softmax in float32.
    logits = functional.linear(hidden, weight, bias).float()
    return functional.cross_entropy(logits, targets, reduction="sum")
