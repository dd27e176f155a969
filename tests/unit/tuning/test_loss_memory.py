"""Logits of one chunk at a time: what is alive, and what is kept for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kuea_mllm.tuning.loss import chunked_cross_entropy

WIDTH, VOCABULARY, CHUNK = 8, 500, 16


class Alive(TorchDispatchMode):
    """Sums up the tensors with a row for each token of the vocabulary, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        result = operator(*given, **(named or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._sizes:
                    key = storage.data_ptr()
                    self._sizes[key] = tensor.numel()
                    weakref.finalize(storage, self._sizes.pop, key, None)
        self.most = max(self.most, sum(self._sizes.values()))
        return result


def logits_alive(loss: Callable[[Tensor, Tensor, Tensor], Tensor], positions: int) -> float:
    """Return the most numbers alive in a forward and a backward pass, in chunks of logits."""
    hidden = torch.randn(positions, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(VOCABULARY, (positions,))
    with Alive() as alive:
        loss(hidden, weight, targets).backward()
    return alive.most / (CHUNK * VOCABULARY)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden, weight, None, targets, chunk=CHUNK)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(hidden @ weight.T, targets)


@pytest.mark.parametrize("chunks", [1, 2, 20])
def test_logits_of_one_chunk_are_alive_whatever_the_number_of_positions(chunks: int) -> None:
    # Logits, their logarithms, and the gradients of both.
    assert 1 <= logits_alive(chunked, CHUNK * chunks) <= 4
    # All of them at once, as the measurement would show.
    assert logits_alive(plain, CHUNK * chunks) >= chunks


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    positions = 20 * CHUNK
    hidden = torch.randn(positions, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = chunked(hidden * 1.0, weight, torch.randint(VOCABULARY, (positions,)))
    assert loss.requires_grad
    assert not [tensor.shape for tensor in kept if tensor.shape[-1:] == (VOCABULARY,)]
