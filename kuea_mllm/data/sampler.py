"""Which images make up which batch: a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler[list[int]]):
    """Draws of one process for every step of a run.

    Batch k of a run is the same whatever the number of processes, of decoding workers, and of times
    that the run was interrupted: it depends on the seed and on k alone. That is what makes N
    processes equal to one, and a resumed run equal to one that was never stopped.

    A draw is `epoch * population + position`: the position in the listing, and the epoch for
    transforms that are random (see `kuea_mllm.data.dataset.ImageDataset`).

    Args:
        positions: Positions to train on, sorted, (images,).
        batch_size: Images in one batch over all processes.
        steps: Batches in the whole run.
        seed: Of the order.
        population: Length of the whole listing.
        start_step: Steps that are done already; iteration begins after them.
        rank: Which process this is.
        world_size: Number of processes.
        shuffle: New order in every epoch; off keeps that of `positions`.

    Raises:
        ValueError: If there are fewer positions than one batch holds, or the batch does not divide
            among the processes.
    """

    def __init__(
        self,
        positions: NDArray[np.int64],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        population: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        if len(positions) < batch_size:
            raise ValueError(f"{len(positions)} images do not fill one batch of {batch_size}")
        if batch_size % world_size:
            raise ValueError(
                f"a batch of {batch_size} does not divide among {world_size} processes"
            )
        self._positions = positions
        self._batch_size = batch_size
        self._steps = steps
        self._seed = seed
        self._population = population
        self._shuffle = shuffle
        self._share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.start_step = start_step

    def __len__(self) -> int:
        """Return the steps of the whole run, those before `start_step` included."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = len(self._positions) // self._batch_size
        epoch, order = -1, self._positions
        for step in range(self.start_step, self._steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self._order(epoch)
            start = step % per_epoch * self._batch_size
            batch = order[start : start + self._batch_size][self._share]
            yield (batch + epoch * self._population).tolist()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return self._positions
        # The images left over at the end of an epoch differ from epoch to epoch, so none is lost
        # for good although only full batches are used.
        generator = np.random.default_rng([self._seed, epoch])
        return generator.permutation(self._positions)
