"""The order in which LLaVA's training visits its samples: alike in modality, then in length.

Equal, index for index, to the original for equal random numbers. Two things differ. Random numbers
come from a generator of our own, made from the seed and the epoch, where the original draws from
whatever state PyTorch's global one is in; give `rng_state` to reproduce such a run. And a run may
begin in the middle.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from kuea_mllm.errors import DataError


class GroupedBatchSampler(Sampler[list[int]]):
    """Batches of one process for one epoch.

    Args:
        lengths: Of every sample in words, negative without an image (`Mixture.lengths()`).
        batch_size: Samples in one micro-batch of one process.
        world_size: Number of processes.
        accumulation: Micro-batches in one optimiser step. It counts like more processes: with the
            paper's 4 x 1 x 32, one megabatch is exactly one optimiser step.
        seed: Of the order.
        epoch: Counts from 0; each has another order.
        rank: Which process this is.
        start_batch: Micro-batches of this process that are done already.
        rng_state: State of PyTorch's global generator to draw from instead of seed and epoch, as
            the original does; of its own first epoch `released_state(seed)`.
        by_modality: Off groups by length alone.
        alike_in_length: Put samples of like length into one micro-batch. The original evens out
            the totals of micro-batches instead, which saves no padding.

    Raises:
        DataError: If there is no sample, or one without a word.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64] | Sequence[int],
        *,
        batch_size: int,
        world_size: int,
        accumulation: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        start_batch: int = 0,
        rng_state: Tensor | None = None,
        by_modality: bool = True,
        alike_in_length: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = batch_size
        self._world_size = world_size
        self._chunks = world_size * accumulation
        self._seed = seed
        self._rank = rank
        self._rng_state = rng_state
        self._by_modality = by_modality
        self._alike_in_length = alike_in_length
        self.epoch = epoch
        self.start_batch = start_batch
        _check_lengths(self._lengths)

    def __len__(self) -> int:
        """Return the micro-batches of one process in an epoch, those done included."""
        return math.ceil(len(self._lengths) / (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[list[int]]:
        batches = rank_batches(
            self.order(), self._batch_size, world_size=self._world_size, rank=self._rank
        )
        yield from batches[self.start_batch :]

    def order(self) -> list[int]:
        """Return the order of the whole epoch over all processes."""
        generator = torch.Generator()
        if self._rng_state is not None:
            generator.set_state(self._rng_state)
        else:
            # Neighbouring seeds and epochs must not meet, as seed + epoch would.
            words = np.random.SeedSequence([self._seed, self.epoch]).generate_state(2)
            generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        return grouped_order(
            self._lengths,
            batch_size=self._batch_size,
            chunks=self._chunks,
            generator=generator,
            by_modality=self._by_modality,
            alike_in_length=self._alike_in_length,
        )


def released_state(seed: int) -> Tensor:
    """Return the state of PyTorch's generator in which the original's trainer asks for its order.

    The trainer seeds, then the data loader draws one number for its workers; nothing else draws
    from it before the first epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return generator.get_state()


def grouped_order(
    lengths: NDArray[np.int64] | Sequence[int],
    *,
    batch_size: int,
    chunks: int,
    generator: torch.Generator,
    last_generator: torch.Generator | None = None,
    by_modality: bool = True,
    alike_in_length: bool = False,
) -> list[int]:
    """Return all positions in the order of training.

    Args:
        lengths: Of every sample, never zero, negative without an image.
        batch_size: Samples in one micro-batch.
        chunks: Micro-batches that go together: processes times accumulation.
        generator: Of the permutations of the images and of the texts.
        last_generator: Of the permutation of megabatches, or the only one where all samples are of
            one modality; by default the same. The original's `generator` argument is this one.
        by_modality: Off groups by length alone, without regard to the sign.
        alike_in_length: See `GroupedBatchSampler`.
    """
    signed = np.asarray(lengths, dtype=np.int64)
    last_generator = last_generator or generator
    if not by_modality:
        return _by_length(
            np.abs(signed), batch_size, chunks, last_generator, is_dealt=not alike_in_length
        )
    if (signed > 0).all() or (signed < 0).all():
        # Without absolute values, also for text: shortest first, as the original does.
        return _by_length(signed, batch_size, chunks, last_generator, is_dealt=not alike_in_length)
    megabatch = batch_size * chunks
    kept: list[list[int]] = []
    put_last: list[int] = []
    for positions in (np.flatnonzero(signed > 0), np.flatnonzero(signed < 0)):
        order = _by_length(
            np.abs(signed[positions]), batch_size, chunks, generator, is_dealt=not alike_in_length
        )
        slices = _slices(positions[order].tolist(), megabatch)
        # The last one, even if it is full: it may be mixed with the other modality's.
        put_last += slices.pop()
        kept += slices
    shuffled = torch.randperm(len(kept), generator=last_generator).tolist()
    return [
        *(position for number in shuffled for position in kept[number]),
        *sorted(put_last),
    ]


def rank_batches(
    order: Sequence[int], batch_size: int, *, world_size: int, rank: int
) -> list[list[int]]:
    """Return the micro-batches of one process, dealt in turn; a short tail is filled up."""
    share = batch_size * world_size
    missing = -len(order) % share
    if world_size == 1:  # nobody waits for a full batch then
        return _slices(list(order), batch_size)
    first = list(order[:share])
    fill = (first * (missing // len(first) + 1))[:missing] if first else []
    return _slices([*order, *fill], batch_size)[rank::world_size]


def _by_length(
    lengths: NDArray[np.int64],
    batch_size: int,
    chunks: int,
    generator: torch.Generator,
    *,
    is_dealt: bool,
) -> list[int]:
    """Shuffle, then sort within megabatches, and deal them into chunks if asked for."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    sizes = lengths.tolist()
    ordered: list[int] = []
    for megabatch in _slices(shuffled, batch_size * chunks):
        megabatch.sort(key=sizes.__getitem__, reverse=True)
        for chunk in _deal(megabatch, sizes, chunks) if is_dealt else [megabatch]:
            ordered += chunk
    return ordered


def _deal(positions: list[int], sizes: list[int], chunks: int) -> list[list[int]]:
    """Split into `chunks` of equally many positions with about the same total length."""
    room, rest = divmod(len(positions), chunks)
    if rest:
        return [positions[number::chunks] for number in range(chunks)]
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    totals = [(0, number) for number in range(chunks)]
    for position in positions:
        # Among equal totals the first chunk is next, as in a search for the minimum.
        total, number = heapq.heappop(totals)
        dealt[number].append(position)
        if len(dealt[number]) < room:
            heapq.heappush(totals, (total + sizes[position], number))
    return dealt


def _slices(positions: list[int], size: int) -> list[list[int]]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def _check_lengths(lengths: NDArray[np.int64]) -> None:
    if not len(lengths):
        raise DataError("there is no sample to train on.")
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise DataError(
            f"sample {empty[0]} has no words ({len(empty)} such samples).",
            "Remove it: `kuea-mllm doctor --data FILE --write-clean CLEAN`.",
        )
