"""The target cache of an alignment recipe: which stores, images and models belong to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kuea_mllm.alignment.inputs import AlignmentInputs
from kuea_mllm.alignment.target_build import BuildReport, build_missing
from kuea_mllm.alignment.target_cache import (
    ORIGINAL,
    Embedder,
    open_stores,
    original_embedder,
    probe_storage,
    require_fixed_transform,
    teacher_embedder,
)
from kuea_mllm.alignment.target_store import EmbeddingStore, Precision, cache_root
from kuea_mllm.alignment.target_verify import Verification, verify_store
from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.errors import RecipeError
from kuea_mllm.towers.model.encode import TowerEncoder


@dataclass(frozen=True)
class TargetCache:
    """The stores of a run with what is needed to fill them.

    Attributes:
        stores: By the names that the rows get in a batch.
        embedders: The frozen models, on `device`.
        dataset: The whole listing.
        positions: Positions that are trained on.
        device: Where the models are.
        precision: What they compute in.
        workers: Processes that decode.
    """

    stores: Mapping[str, EmbeddingStore]
    embedders: Mapping[str, Embedder]
    dataset: ImageDataset
    positions: NDArray[np.int64]
    device: torch.device
    precision: Precision
    workers: int

    def build(self, *, progress: bool, rank: int = 0, world_size: int = 1) -> BuildReport:
        """Compute what is missing; see `build_missing`."""
        return build_missing(
            self.stores,
            self.dataset,
            self.positions,
            self.embedders,
            device=self.device,
            workers=self.workers,
            precision=self.precision,
            progress=progress,
            rank=rank,
            world_size=world_size,
        )

    def verify(self, *, count: int, seed: int) -> dict[str, Verification]:
        """Compute a sample of each store anew; see `verify_store`."""
        return {
            name: verify_store(
                store,
                self.dataset,
                self.embedders[name],
                count=count,
                seed=seed,
                device=self.device,
                precision=self.precision,
                workers=self.workers,
            )
            for name, store in self.stores.items()
        }


def open_target_cache(
    inputs: AlignmentInputs,
    *,
    original: TowerEncoder | None = None,
    device: torch.device | None = None,
) -> TargetCache:
    """Open the stores of a recipe's inputs.

    Args:
        inputs: What the recipe names.
        original: The frozen original tower; by default the student, as long as it is untrained.
        device: Where teachers and original go; by default the recipe's.

    Raises:
        RecipeError: If the images cannot be cached.
        UserError: If a store is damaged, or the place cannot be written.
    """
    recipe, images = inputs.recipe, inputs.images
    if images.positions is None or not isinstance(images.training, ImageDataset):
        raise RecipeError(
            "a stream has no target cache: its images cannot be read by position.",
            "Set data.stream=false, or make a pack of the stream first (kuea-mllm pack).",
        )
    require_fixed_transform(images.training)
    device, precision = device or _own_device(recipe.runtime.device), recipe.runtime.precision
    embedders = {
        f"teacher_{number}": teacher_embedder(
            teacher.to(device), description=f"{teacher.source} ({teacher.readout})"
        )
        for number, teacher in enumerate(inputs.teachers)
    }
    encoder = (original or TowerEncoder(inputs.student)).eval().to(device)
    embedders[ORIGINAL] = original_embedder(encoder, description=inputs.student.source)
    size = images.training.transform.image_size
    embedders = {
        name: probe_storage(embedder, image_size=size, device=device, precision=precision)
        for name, embedder in embedders.items()
    }
    stores = open_stores(
        cache_root(recipe.targets.directory),
        source_fingerprint=images.listing,
        population=len(images.training),
        transform_fingerprint=images.training.transform.fingerprint,
        embedders=embedders,
        precision=precision,
    )
    return TargetCache(
        stores=stores,
        embedders=embedders,
        dataset=images.training,
        positions=images.positions,
        device=device,
        precision=precision,
        workers=recipe.data.workers,
    )


def _own_device(device: str) -> torch.device:
    # Under torchrun every process of a machine takes a card of its own.
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)
