"""Compute rows of a target cache anew and compare."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kuea_mllm.alignment.target_cache import Embedder, ImageItems, embed, image_name, row_to_tensor
from kuea_mllm.alignment.target_decoding import cut_batches, decoding_loader
from kuea_mllm.alignment.target_store import EmbeddingStore, Precision
from kuea_mllm.errors import DataError


@dataclass(frozen=True)
class Verification:
    """How recomputed rows compare with those of a store.

    Attributes:
        checked: Rows recomputed.
        max_relative_error: Largest |new - kept| / |kept|, over rows, as norms.
        changed: Names of images whose pixels are not those that the row was computed from.
    """

    checked: int
    max_relative_error: float
    changed: tuple[str, ...]


def verify_store(
    store: EmbeddingStore,
    dataset: ImageItems,
    embedder: Embedder,
    *,
    count: int = 256,
    seed: int = 0,
    device: torch.device,
    precision: Precision = "fp32",
    batch_size: int = 256,
    workers: int = 0,
) -> Verification:
    """Compute a random sample of the finished rows anew and compare.

    Raises:
        DataError: If the store holds no row yet.
        EnvironmentFailure: If a row is damaged.
    """
    done = np.flatnonzero(store.done)
    if not len(done):
        raise DataError(
            f"cache {store.directory} holds no row yet.",
            "Build it first; caches of other images, weights or precision have other names "
            "(kuea-mllm cache ls).",
        )
    generator = np.random.default_rng(seed)
    sample = np.sort(generator.choice(done, size=min(count, len(done)), replace=False))
    changed: list[str] = []
    worst = 0.0
    for batch in decoding_loader(dataset, cut_batches(sample, batch_size), workers):
        batch.raise_first()
        kept = torch.stack([row_to_tensor(store, int(p)) for p in batch.positions]).float()
        stale = store.checksums[batch.positions, 0] != batch.checksums
        changed += [image_name(dataset, int(p)) for p in batch.positions[stale]]
        new = embed(embedder, batch.pixels, device, precision).float()
        error = (new - kept).norm(dim=1) / kept.norm(dim=1).clamp_min(1e-30)
        if not stale.all():
            worst = max(worst, error[torch.from_numpy(~stale)].max().item())
    return Verification(len(sample), worst, tuple(changed))
