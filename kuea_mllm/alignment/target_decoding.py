"""Decode images in batches, for targets that are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kuea_mllm.alignment.target_cache import ImageItems
from kuea_mllm.errors import KueaError


@dataclass
class DecodedBatch:
    """One batch of images, as workers hand it over.

    Attributes:
        positions: Where its images are in the listing, (n,).
        pixels: uint8, (n, 3, size, size).
        checksums: crc32 of the pixels of each, (n,).
        replaced: Unreadable positions, each with the one that stands in for it; not in `pixels`.
        errors: What went wrong with the others.
    """

    positions: NDArray[np.int64]
    pixels: Tensor
    checksums: NDArray[np.uint32]
    replaced: list[tuple[int, int]]
    errors: list[KueaError]

    def pin_memory(self) -> DecodedBatch:
        """Called by a DataLoader that pins."""
        self.pixels = self.pixels.pin_memory()
        return self

    def raise_first(self) -> None:
        """Raise the first error, if there is one."""
        if self.errors:
            raise self.errors[0]


class _Guarded(Dataset[Any]):
    """Hands errors over as values: a DataLoader would wrap them in the text of a traceback."""

    def __init__(self, dataset: ImageItems) -> None:
        self._dataset = dataset

    def __getitem__(self, position: int) -> tuple[int, Any]:
        try:
            return position, self._dataset[position]
        except KueaError as error:
            return position, (type(error), error.problem, error.remedy)


def _collate(items: Sequence[tuple[int, Any]]) -> DecodedBatch:
    errors = [item[0](*item[1:]) for _, item in items if isinstance(item, tuple)]
    read = [(p, item) for p, item in items if not isinstance(item, tuple)]
    own = [(p, item) for p, item in read if int(item["index"]) == p]
    return DecodedBatch(
        positions=np.array([p for p, _ in own], np.int64),
        pixels=torch.stack([item["pixels"] for _, item in own]) if own else torch.empty(0),
        checksums=np.array([int(item["checksum"]) for _, item in own], np.uint32),
        replaced=[(p, int(item["index"])) for p, item in read if int(item["index"]) != p],
        errors=errors,
    )


def decoding_loader(
    dataset: ImageItems,
    batches: Sequence[NDArray[np.int64]] | Sampler[list[int]],
    workers: int,
    *,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Return a loader of `DecodedBatch`, in the order given."""
    order: Any = batches if isinstance(batches, Sampler) else [b.tolist() for b in batches]
    return DataLoader(
        _Guarded(dataset),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
    )


def cut_batches(positions: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Cut positions into batches; the last one may be smaller."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]
