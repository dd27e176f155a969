"""The order in which patch probing sees its pictures."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the positions of all pictures in the order of an epoch, counted from 0.

    It follows from the seed alone. A `DataLoader` that shuffles would draw once more in an epoch
    that worker processes read ahead of, and their number would decide on later epochs.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch + 1):
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # as a DataLoader begins
        order = torch.randperm(count, generator=generator)
    return order


class EpochOrders(Sampler[int]):
    """The order of one epoch after the other.

    Args:
        count: Number of pictures.
        seed: Of all orders.
        epoch: Which one to begin with, counted from 0.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self._count, self._seed, self._epoch = count, seed, epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        """Yield the positions of the next epoch."""
        order = epoch_order(self._count, self._seed, self._epoch)
        self._epoch += 1
        return iter(order.tolist())
