"""Checks on the values of a tower's weights, a few million at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# 16 MiB of float32: the copies made on the way stay in the cache and out of the peak memory.
_CHUNK = 1 << 22
_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def rounded_to_half(state: Mapping[str, Tensor]) -> str | None:
    """Tell whether the weights of a wider type were rounded to half precision before.

    Only matrices are looked at: open_clip's builder for OpenAI dicts rounds convolution, attention,
    MLP and projection and leaves norms, class embedding and positions as they are.

    Args:
        state: Weights, by any names; read one tensor at a time, and no further than the first
            value that speaks against it.

    Returns:
        "float16" or "bfloat16" if every matrix is stored in a wider type and could be stored there
        without loss, else None.
    """
    possible = dict(_HALVES)
    seen = False
    for name in state:
        tensor = state[name]
        if not _is_matrix(name, tensor):
            continue
        if tensor.dtype.itemsize <= 2:
            return None
        for values in _chunks(tensor):
            # A matrix of zeros says nothing about the others.
            seen = seen or bool(values.any())
            for half, dtype in list(possible.items()):
                if not torch.equal(values.to(dtype).to(values.dtype), values):
                    del possible[half]
            if not possible:
                return None
    return next(iter(possible)) if seen else None


def count_non_finite(state: Mapping[str, Tensor]) -> tuple[int, str]:
    """Return how many values are NaN or infinite, and the first tensor that holds one ("")."""
    count, first = 0, ""
    for name in state:
        if not state[name].is_floating_point():
            continue
        found = sum(
            values.numel() - int(torch.isfinite(values).sum()) for values in _chunks(state[name])
        )
        count += found
        first = first or (name if found else "")
    return count, first


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2 and "pos" not in name


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(tensor.detach().reshape(-1), _CHUNK))
