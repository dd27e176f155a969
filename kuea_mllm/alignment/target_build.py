"""Compute the rows of target caches: resumable, by any number of processes, one decode for all.

Rows that are missing are cut into batches of a fixed size, in the order of the listing. A process
claims a batch in every store that lacks it (see `StoreWriter`), decodes it once, runs each model
that needs it, and marks the rows as done only when they are on disk. So a kill at any time loses
seconds of work and leaves nothing half-written that counts, and what remains is cut into the same
batches as before: an interrupted build gives the bits of an uninterrupted one. Rows that were
computed in batches of other images or another size may differ by float rounding.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from kuea_mllm.alignment.target_cache import (
    Embedder,
    ImageItems,
    embed,
    image_name,
    require_fixed_transform,
)
from kuea_mllm.alignment.target_decoding import DecodedBatch, cut_batches, decoding_loader
from kuea_mllm.alignment.target_store import EmbeddingStore, Precision
from kuea_mllm.alignment.target_writer import StoreWriter
from kuea_mllm.data.unreadable import too_many_unreadable
from kuea_mllm.errors import EnvironmentFailure, TowerError
from kuea_mllm.log import LOGGER

BUILD_BATCH_SIZE = 256
_COMMIT_SECONDS = 5.0
_POLL_SECONDS = 0.2
_REMIND_SECONDS = 60.0
_STORED_AS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        images: Rows that were asked for.
        computed: Images that this process embedded.
        replaced: Positions whose image cannot be read, and stood in for by another.
        seconds: How long it took.
    """

    images: int
    computed: int
    replaced: tuple[int, ...]
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images that this process embedded per second."""
        return self.computed / max(self.seconds, 1e-9)


def build_missing(
    stores: Mapping[str, EmbeddingStore],
    dataset: ImageItems,
    positions: NDArray[np.int64],
    embedders: Mapping[str, Embedder],
    *,
    device: torch.device,
    workers: int = 0,
    batch_size: int = BUILD_BATCH_SIZE,
    precision: Precision = "fp32",
    progress: bool = False,
    rank: int = 0,
    world_size: int = 1,
    commit_seconds: float = _COMMIT_SECONDS,
) -> BuildReport:
    """Compute what the stores lack; returns when all positions are done, whoever computed them.

    Any number of processes may build the same stores at once, related or not.

    Args:
        stores: From `open_stores`.
        dataset: Items {"pixels", "index", "checksum"} of the whole listing.
        positions: Which images, in any order.
        embedders: The models, under the names of the stores, on `device`.
        device: Where they run.
        workers: Processes that decode.
        batch_size: Images embedded at once; part of the float rounding of the results.
        precision: The same as in the key of the stores.
        progress: Show a bar with images/s.
        rank: Which of several equal processes this is: each begins at another place.
        world_size: How many there are.
        commit_seconds: Time between two commits to disk, the most that a kill loses.

    Returns:
        What was done.

    Raises:
        RecipeError: If the transform is random.
        UnreadableImage: If an image cannot be read and the data set does not skip it, or more of
            them than it may skip.
        TowerError: If an embedding is not finite, or not what the store is made for.
        EnvironmentFailure: If the disk is full, or would be.
    """
    require_fixed_transform(dataset)
    wanted = np.unique(np.asarray(positions, dtype=np.int64))
    lacking = _lacking(stores, wanted)
    if not len(lacking):
        LOGGER.info("targets: all %d images are cached", len(wanted))
        return BuildReport(len(wanted), 0, (), 0.0)
    _require_space(stores, wanted)
    LOGGER.info(
        "targets: %d of %d images are cached, computing the others (%s, batches of %d) into %s",
        len(wanted) - len(lacking),
        len(wanted),
        precision,
        batch_size,
        next(iter(stores.values())).directory.parent,
    )
    started = time.perf_counter()
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(lacking), desc="targets", unit="image", disable=not progress)
        )
        # Two names of one model share one store: its rows are written once.
        writers = {
            name: stack.enter_context(StoreWriter(store))
            for name, store in stores.items()
            if name == next(n for n in stores if stores[n].directory == store.directory)
        }
        build = _Build(writers, dataset, embedders, device, precision, bar, commit_seconds, workers)
        while len(lacking):
            computed = build.computed
            order = _rotated(cut_batches(lacking, batch_size), rank, world_size)
            build.run(order)
            # A row that stands in for an unreadable image may lie outside of what was asked for.
            wanted = np.union1d(wanted, np.fromiter(build.stand_ins, np.int64))
            for store in stores.values():
                store.refresh()
            lacking = _lacking(stores, np.setdiff1d(wanted, list(build.unreadable)))
            if len(lacking) and build.computed == computed:
                build.wait(len(lacking))
    seconds = time.perf_counter() - started
    report = BuildReport(len(wanted), build.computed, tuple(sorted(build.unreadable)), seconds)
    LOGGER.info(
        "targets: %d images computed in %.0f s (%.0f images/s)",
        report.computed,
        seconds,
        report.images_per_second,
    )
    return report


@dataclass
class _Build:
    """One process at work; remembers what it holds until that is on disk."""

    writers: Mapping[str, StoreWriter]
    dataset: ImageItems
    embedders: Mapping[str, Embedder]
    device: torch.device
    precision: Precision
    bar: Any
    commit_seconds: float
    workers: int
    computed: int = 0
    unreadable: set[int] = field(default_factory=set)
    stand_ins: set[int] = field(default_factory=set)
    _reminded: float | None = None

    def run(self, batches: Sequence[NDArray[np.int64]]) -> None:
        """Compute those of the batches that nobody else computes."""
        claims = _Claims(self.writers, batches, self.bar)
        if not claims.find_first():
            return  # no worker is started in vain while another process has all that is left
        uncommitted: list[tuple[str, NDArray[np.int64]]] = []
        last_commit = time.monotonic()
        is_cuda = self.device.type == "cuda"
        loader = decoding_loader(self.dataset, claims, self.workers, pin_memory=is_cuda)
        try:
            for batch in loader:
                batch.raise_first()
                for position, stand_in in batch.replaced:
                    self.unreadable.add(position)
                    self.stand_ins.add(stand_in)
                self._require_few_unreadable()
                if len(batch.positions):
                    uncommitted += self._compute(batch)
                self.bar.update(len(batch.positions) + len(batch.replaced))
                self.computed += len(batch.positions)
                claims.finished += 1
                if time.monotonic() - last_commit >= self.commit_seconds:
                    self._commit(uncommitted)
                    claims.release_finished()
                    uncommitted, last_commit = [], time.monotonic()
        finally:
            # Also after an error or Ctrl-C: what was computed until then is kept.
            try:
                self._commit(uncommitted)
            finally:
                claims.release_all()

    def wait(self, count: int) -> None:
        """Wait a little for another process that holds all that is left."""
        now = time.monotonic()
        if self._reminded is None or now - self._reminded > _REMIND_SECONDS:
            self._reminded = now
            LOGGER.info("targets: waiting for another process that computes %d images", count)
        time.sleep(_POLL_SECONDS)

    def _compute(self, batch: DecodedBatch) -> list[tuple[str, NDArray[np.int64]]]:
        written = []
        for name, writer in self.writers.items():
            mask = writer.store.missing(batch.positions)
            if not mask.any():
                continue
            rows = embed(self.embedders[name], batch.pixels, self.device, self.precision)
            self._require_sound(name, writer.store, rows, batch.positions)
            kept = rows.numpy() if rows.dtype == torch.float32 else rows.view(torch.int16).numpy()
            positions = batch.positions[mask]
            writer.write(positions, np.ascontiguousarray(kept[mask]), batch.checksums[mask])
            written.append((name, positions))
        return written

    def _commit(self, written: Sequence[tuple[str, NDArray[np.int64]]]) -> None:
        for name in {name for name, _ in written}:
            self.writers[name].flush()
        for name, positions in written:
            self.writers[name].mark_done(positions)

    def _require_few_unreadable(self) -> None:
        # Each image counts for itself in the data set; the sum would only end the training after.
        skip = getattr(self.dataset, "skip", None)
        if skip is not None and len(self.unreadable) > skip.limit:
            names = [image_name(self.dataset, position) for position in sorted(self.unreadable)]
            raise too_many_unreadable(len(names), skip.limit, names)

    def _require_sound(
        self, name: str, store: EmbeddingStore, rows: Tensor, positions: NDArray[np.int64]
    ) -> None:
        expected = (len(positions), store.key.width)
        if rows.shape != expected or rows.dtype != _STORED_AS[store.key.storage]:
            raise TowerError(
                f"{name} ({store.description}) gives {rows.dtype} {tuple(rows.shape)}, its cache "
                f"holds {store.key.storage} {expected}."
            )
        bad = np.flatnonzero(~torch.isfinite(rows).all(1).numpy())
        if len(bad):
            image = image_name(self.dataset, int(positions[bad[0]]))
            raise TowerError(
                f"{name} ({store.description}) gives an embedding that is not finite for image "
                f"{image}, in {self.precision}.",
                "Check its weights, or use runtime.precision=fp32.",
            )


class _Claims(Sampler[list[int]]):
    """Yields the batches that this process could claim; runs ahead of the decoding workers."""

    def __init__(
        self, writers: Mapping[str, StoreWriter], batches: Sequence[NDArray[np.int64]], bar: Any
    ) -> None:
        self._writers = list(writers.values())
        self._batches = batches
        self._bar = bar
        self._held: list[NDArray[np.int64]] = []
        self._work = self._find()
        self._first: list[int] = []
        self.finished = 0

    def find_first(self) -> bool:
        """Claim the first batch that can be had; False if there is none."""
        self._first = next(self._work, [])
        return bool(self._first)

    def __iter__(self) -> Iterator[list[int]]:
        yield self._first
        yield from self._work

    def _find(self) -> Iterator[list[int]]:
        for batch in self._batches:
            if not self._claim(batch):
                continue
            # Looked at only now: whoever held the claim before may have finished it.
            mask = np.zeros(len(batch), np.bool_)
            for writer in self._writers:
                mask |= writer.store.missing(batch)
            if not mask.all():
                self._bar.update(int((~mask).sum()))
            if not mask.any():
                self._release(batch, self._writers)
                continue
            self._held.append(batch)
            yield batch[mask].tolist()

    def release_finished(self) -> None:
        """Give up the claims of the batches that are computed and committed."""
        for batch in self._held[: self.finished]:
            self._release(batch, self._writers)
        self._held, self.finished = self._held[self.finished :], 0

    def release_all(self) -> None:
        """Give up every claim."""
        self.finished = len(self._held)
        self.release_finished()

    def _claim(self, batch: NDArray[np.int64]) -> bool:
        for number, writer in enumerate(self._writers):
            if not writer.claim(int(batch[0]), int(batch[-1])):
                # All or nothing, and never waiting: two processes cannot block each other.
                self._release(batch, self._writers[:number])
                return False
        return True

    def _release(self, batch: NDArray[np.int64], writers: Sequence[StoreWriter]) -> None:
        for writer in writers:
            writer.release(int(batch[0]), int(batch[-1]))


def _lacking(
    stores: Mapping[str, EmbeddingStore], positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    mask = np.zeros(len(positions), np.bool_)
    for store in stores.values():
        mask |= store.missing(positions)
    return positions[mask]


def _rotated(
    batches: list[NDArray[np.int64]], rank: int, world_size: int
) -> list[NDArray[np.int64]]:
    start = len(batches) * rank // world_size
    return batches[start:] + batches[:start]


def _require_space(stores: Mapping[str, EmbeddingStore], wanted: NDArray[np.int64]) -> None:
    by_directory = {store.directory: store for store in stores.values()}
    needed = sum(
        store.needed_bytes(int(store.missing(wanted).sum())) for store in by_directory.values()
    )
    root = next(iter(by_directory)).parent
    free = shutil.disk_usage(root).free
    if needed > free:
        raise EnvironmentFailure(
            f"the target cache needs up to {_size(needed)} in {root}, where {_size(free)} are "
            "free.",
            "Free some space, use fewer images (data.fraction), or choose another place with "
            "targets.directory or $KUEA_MLLM_CACHE.",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
