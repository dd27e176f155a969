"""Embeddings of all images of a data set, computed once and kept on disk.

Every suite reads the same rows. A store is a directory named by a digest of all that its numbers
depend on, so that the features of one tower are never taken for those of another. Rows are appended
in the order of the images, a shard at a time; what was interrupted goes on at the last whole shard.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from kuea_mllm.data.cache import cache_folder
from kuea_mllm.data.source import ImageSource, as_raised_in_worker
from kuea_mllm.errors import DataError, KueaError, TowerError
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.embedder import ImageEmbedder, PixelRule, checksum
from kuea_mllm.probing.feature_files import (
    PREFIX,
    ROWS_FILE,
    Dtype,
    FeatureFiles,
    FeatureKey,
    Features,
)
from kuea_mllm.probing.kept_features import locked_store

SHARD_ROWS = 4096
SHARD_SECONDS = 30.0
"""A shard is written at least as often, so that a kill costs little."""

_SPOT_CHECKS = 8


@dataclass(frozen=True)
class FeatureStore:
    """Finished embeddings of one listing by one model.

    Attributes:
        directory: Where they are.
        key: What they depend on.
        computed: How many of them this call computed; the others were there.
        images_per_second: Speed of that, 0 if nothing was computed.
    """

    directory: Path
    key: FeatureKey
    computed: int = 0
    images_per_second: float = 0.0

    @functools.cached_property
    def embeddings(self) -> Features:
        """(images, width), float32, not normalised; mapped into memory, read only."""
        mapped: Features = np.load(self.directory / ROWS_FILE, mmap_mode="r")
        return mapped.view(np.ndarray)

    def __len__(self) -> int:
        return self.key.count

    def describe(self) -> dict[str, Any]:
        """Return what a results file says about it."""
        return {**asdict(self.key), "digest": self.key.digest}


@dataclass(frozen=True)
class Extraction:
    """How embeddings are computed.

    Attributes:
        device: Where the model is.
        dtype: float32, or autocast to bfloat16 or float16; rows are float32 always.
        batch_size: Images at once.
        workers: Processes that decode; 0 decodes in this one.
        cache: Folder of stores; None takes `data.cache.cache_folder`.
        progress: Whether to show a bar with images/s.
    """

    device: str = "cpu"
    dtype: Dtype = "float32"
    batch_size: int = 64
    workers: int = 4
    cache: Path | None = None
    progress: bool = False

    @property
    def root(self) -> Path:
        """Folder of stores."""
        return (cache_folder() if self.cache is None else self.cache) / "probing"


def extract(images: ImageSource, embedder: ImageEmbedder, how: Extraction) -> FeatureStore:
    """Return the embeddings of all images, from the cache as far as they are there.

    Of several processes that want the same rows, one computes them and the others wait.

    Args:
        images: The listing.
        embedder: The model; it is moved to `how.device`.
        how: See `Extraction`.

    Raises:
        UnreadableImage: If an image cannot be read; names it.
        TowerError: If an embedding is not finite; names the image.
        DataError: If the store is damaged, or the images are not those it was made from.
        EnvironmentFailure: If the disk is full.
    """
    key = FeatureKey(
        images=images.fingerprint(),
        count=len(images),
        pixels=embedder.rule.fingerprint,
        embedder=embedder.fingerprint,
        dtype=how.dtype,
        width=embedder.width,
    )
    directory = how.root / f"{PREFIX}{key.digest}"
    with locked_store(directory):
        part = FeatureFiles(directory, key, embedder.description, images.name(0))
        part.open()
        _spot_check(images, embedder, part)
        todo = key.count - part.rows
        started = time.perf_counter()
        if todo:
            LOGGER.info("features: %d of %d images to embed, into %s", todo, key.count, directory)
            _compute(images, embedder, how, part)
        seconds = max(time.perf_counter() - started, 1e-9)
        store = FeatureStore(directory, key, todo, todo / seconds if todo else 0.0)
        # Mapped now: another process may remove the store, and what is mapped stays readable.
        _ = store.embeddings
    return store


class _Pixels(Dataset[tuple[Tensor, int]]):
    """Pixels and their checksum, decoded in worker processes."""

    def __init__(self, images: ImageSource, rule: PixelRule, first: int) -> None:
        self._images, self._rule, self._first = images, rule, first
        self._count = len(images) - first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        pixels = self._rule(self._images.read(self._first + item))
        return torch.from_numpy(pixels), checksum(pixels)


@torch.inference_mode()
def _compute(
    images: ImageSource, embedder: ImageEmbedder, how: Extraction, part: FeatureFiles
) -> None:
    embedder.module.to(how.device).eval()
    first = part.rows
    kept: list[Features] = []
    sums: list[NDArray[np.uint32]] = []
    written = time.monotonic()
    with tqdm(
        total=part.key.count,
        initial=first,
        desc="features",
        unit="image",
        disable=not how.progress,
    ) as bar:
        for pixels, checksums in _batches(images, embedder, how, first):
            rows = _embed(embedder, pixels, how)
            _require_finite(rows, images, first, how)
            first += len(rows)
            kept.append(rows)
            sums.append(checksums.numpy().astype("<u4"))
            bar.update(len(rows))
            is_due = time.monotonic() - written >= SHARD_SECONDS
            if is_due or sum(map(len, kept)) >= SHARD_ROWS or first == part.key.count:
                part.append(np.concatenate(kept), np.concatenate(sums))
                kept, sums, written = [], [], time.monotonic()


def _batches(
    images: ImageSource, embedder: ImageEmbedder, how: Extraction, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        _Pixels(images, embedder.rule, first),
        batch_size=how.batch_size,
        num_workers=how.workers,
        pin_memory=how.device.startswith("cuda"),
        prefetch_factor=4 if how.workers else None,
    )
    try:
        yield from loader
    except KueaError as error:
        raise as_raised_in_worker(error) from None


def _embed(embedder: ImageEmbedder, pixels: Tensor, how: Extraction) -> Features:
    device = torch.device(how.device)
    precision = getattr(torch, how.dtype)
    with torch.autocast(device.type, precision, enabled=how.dtype != "float32"):
        rows: Tensor = embedder.module(embedder.rule.finish(pixels.to(device, non_blocking=True)))
    kept: Features = rows.float().cpu().numpy().astype("<f4")
    return kept


def _require_finite(rows: Features, images: ImageSource, first: int, how: Extraction) -> None:
    is_finite = np.isfinite(rows).all(1)
    if is_finite.all():
        return
    bad = int(np.argmin(is_finite))
    raise TowerError(
        f"the embedding of image {images.name(first + bad)} holds NaN or infinity ({how.dtype}).",
        "Compute in float32 (--dtype float32); if it stays, the weights are damaged: "
        "`kuea-mllm convert TOWER --inspect`.",
    )


def _spot_check(images: ImageSource, embedder: ImageEmbedder, part: FeatureFiles) -> None:
    """Decode a few of the images again: a listing's fingerprint holds names and sizes only."""
    if not part.rows:
        return
    for position in np.unique(np.linspace(0, part.rows - 1, _SPOT_CHECKS).astype(int)).tolist():
        if checksum(embedder.rule(images.read(position))) != part.pixel_checksum(position):
            raise DataError(
                f"image {images.name(position)} changed since the cache {part.directory} was built "
                "(its pixels have another checksum).",
                "Restore the image, or remove that directory. If all images differ, an image "
                "library decodes them in another way than then.",
            )
