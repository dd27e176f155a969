"""Targets from disk: embeddings of frozen models that are computed once for every image.

They are pure functions of the image, the transform and the weights, so a run that finds them on
disk does not run the frozen towers at all. `target_store` keeps them, `target_build` computes them,
this module puts them into batches.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kuea_mllm.alignment.target_store import (
    CacheKey,
    EmbeddingStore,
    Precision,
    Storage,
    cache_root,
)
from kuea_mllm.alignment.targets import LiveTargets, Targets
from kuea_mllm.errors import DataError, RecipeError
from kuea_mllm.features import Features
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.fingerprint import fingerprint_tensors

__all__ = [
    "CacheKey",
    "CachedImages",
    "CachedTargets",
    "Embedder",
    "EmbeddingStore",
    "cache_root",
    "embed",
    "open_stores",
    "original_embedder",
    "probe_storage",
    "teacher_embedder",
]

ORIGINAL = "original"
_STORAGES: dict[torch.dtype, Storage] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class ImageItems(Protocol):
    """A data set of images, as `kuea_mllm.data.dataset.ImageDataset` is one."""

    def __len__(self) -> int:
        """Return the length of the listing."""
        ...

    def __getitem__(self, draw: int, /) -> Mapping[str, Any]:
        """Return {"pixels": uint8 (3, size, size), "index": position, "checksum": crc32}."""
        ...


@dataclass(frozen=True)
class Embedder:
    """A frozen model whose embeddings are kept.

    Attributes:
        fingerprint: Changes with anything that changes an embedding.
        width: Numbers in one embedding.
        module: Images in [0, 1], (n, 3, size, size), to embeddings (n, width).
        description: For people: what it is and where it came from.
        storage: How a number is kept. float32 holds everything exactly; bfloat16 takes half the
            disk and is exact where the model returns bfloat16; see `probe_storage`.
    """

    fingerprint: str
    width: int
    module: Callable[[Tensor], Tensor]
    description: str
    storage: Storage = "float32"


def teacher_embedder(teacher: nn.Module, *, description: str) -> Embedder:
    """Describe a `kuea_mllm.teachers.Teacher`; its fingerprint covers its settings."""
    fields: Any = teacher
    return Embedder(fields.fingerprint, fields.width, teacher, description)


def original_embedder(encoder: TowerEncoder, *, description: str) -> Embedder:
    """Describe the original tower as it is now: call this before training and before compiling.

    `Tower.fingerprint` would not do: it leaves out the projection, activation and pixel statistics,
    on which the pooled embedding depends.
    """
    settings = json.dumps(encoder.spec.to_dict(), sort_keys=True)
    state = sorted(encoder.model.state_dict().items())
    fingerprint = fingerprint_tensors([(settings, torch.empty(0)), *state])
    return Embedder(fingerprint, encoder.width, encoder, description)


def probe_storage(
    embedder: Embedder, *, image_size: int, device: torch.device, precision: Precision
) -> Embedder:
    """Return the embedder with the smallest storage that is exact for what it returns.

    Under autocast that depends on the model's last operation and on the device: CUDA returns
    float32 from a layer norm, bfloat16 from a projection.
    """
    with torch.no_grad(), autocast(device, precision):
        row = embedder.module(torch.zeros(1, 3, image_size, image_size, device=device))
    return dataclasses.replace(embedder, storage=_STORAGES.get(row.dtype, "float32"))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context that the trainer uses for this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def embed(embedder: Embedder, pixels: Tensor, device: torch.device, precision: Precision) -> Tensor:
    """Embed uint8 pixels as the trainer does; float32 or bfloat16 on the CPU."""
    pixels01 = pixels.to(device, non_blocking=True).to(torch.float32) / 255
    with autocast(device, precision):
        rows = embedder.module(pixels01)
    if embedder.storage == "float32" and rows.dtype == torch.bfloat16:
        rows = rows.float()  # exact
    return rows.detach().cpu()


def open_stores(
    root: Path,
    *,
    source_fingerprint: str,
    population: int,
    transform_fingerprint: str,
    embedders: Mapping[str, Embedder],
    precision: Precision,
) -> dict[str, EmbeddingStore]:
    """Open the store of each embedder, empty where it is new.

    Stores do not know each other: runs with other students share a teacher's.

    Args:
        root: Folder of caches; see `cache_root`.
        source_fingerprint: Of the listing (`ImageSource.fingerprint`).
        population: Length of the listing.
        transform_fingerprint: `ImageTransform.fingerprint`.
        embedders: By the name under which their rows enter a batch: "teacher_0", "teacher_1", ...,
            "original".
        precision: What the towers compute in.

    Returns:
        The stores by the same names.

    Raises:
        UserError: If a store is damaged, or the place cannot be written.
    """
    return {
        name: EmbeddingStore.open(
            root,
            CacheKey(
                images=source_fingerprint,
                population=population,
                transform=transform_fingerprint,
                embedder=embedder.fingerprint,
                precision=precision,
                storage=embedder.storage,
                width=embedder.width,
            ),
            description=embedder.description,
        )
        for name, embedder in embedders.items()
    }


class CachedImages(Dataset[dict[str, Any]]):
    """A data set of images that adds the cached rows to each item and verifies them.

    The pixels are still decoded (the student needs them), so their checksum is compared with that
    of the pixels the row was computed from, for every item of every epoch.

    Args:
        dataset: Items {"pixels", "index", "checksum"}, without random transform.
        stores: By the names that the rows get; rows must be built already.

    Raises:
        RecipeError: If the transform is random.
        DataError: If a store is not of this listing.
    """

    def __init__(self, dataset: ImageItems, stores: Mapping[str, EmbeddingStore]) -> None:
        require_fixed_transform(dataset)
        for store in stores.values():
            if store.key.population != len(dataset):
                raise DataError(
                    f"cache {store.directory} is of {store.key.population} images, the listing "
                    f"holds {len(dataset)}."
                )
        self.dataset = dataset
        self.stores = dict(stores)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """Return the item of a draw with one more entry per store: a tensor (width,).

        Raises:
            DataError: If the image changed since its row was computed, or has no row.
            EnvironmentFailure: If the row is damaged.
        """
        item = dict(self.dataset[draw])
        position = int(item["index"])
        for name, store in self.stores.items():
            self._verify(store, position, int(item["checksum"]))
            item[name] = row_to_tensor(store, position)
        return item

    def _verify(self, store: EmbeddingStore, position: int, checksum: int) -> None:
        if not store.done[position]:
            raise DataError(
                f"image {image_name(self.dataset, position)} is not in the cache "
                f"{store.directory}.",
                "Build it: kuea-mllm cache build.",
            )
        if int(store.checksums[position, 0]) != checksum:
            raise DataError(
                f"image {image_name(self.dataset, position)} changed since the cache "
                f"{store.directory} was built (its pixels have another checksum).",
                f"Remove the cache (kuea-mllm cache rm {store.key.digest}), or restore the image. "
                "If all images differ, an image library decodes them in another way than then.",
            )


class CachedTargets:
    """A `TargetSource` that takes pooled embeddings from the batch.

    Args:
        live: The frozen models, where a term compares patch tokens: those are not cached (a
            ViT-L-14-336 has 576 of them per image), and only the models whose patch tokens are
            needed are run. None runs nothing.
    """

    def __init__(self, live: LiveTargets | None = None) -> None:
        self._live = live

    @property
    def original(self) -> nn.Module | None:
        """The frozen original tower, if it is in memory."""
        return None if self._live is None else self._live.original

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> Targets:
        """Return the targets of a batch of `CachedImages` items; see `TargetSource`."""
        names = [name for name in batch if name.startswith("teacher_")]
        teachers = tuple(Features(batch[f"teacher_{i}"]) for i in range(len(names)))
        original = Features(batch[ORIGINAL])
        if self._live is not None and self._live.patch_layer is not None:
            patches = self._live.original_features(batch["pixels"]).patches
            original = original._replace(patches=patches)
        if self._live is not None and self._live.teacher_patches:
            live = self._live.teacher_features(batch["pixels"])
            teachers = tuple(
                cached._replace(patches=features.patches)
                for cached, features in zip(teachers, live, strict=True)
            )
        return Targets(teachers=teachers, original=original)


def row_to_tensor(store: EmbeddingStore, position: int) -> Tensor:
    """Return one row as the model gave it: float32 or bfloat16, (width,)."""
    row = torch.from_numpy(store.row(position))
    return row.view(torch.bfloat16) if store.key.storage == "bfloat16" else row


def require_fixed_transform(dataset: ImageItems) -> None:
    """Refuse a data set that gives other pixels every time.

    Raises:
        RecipeError: If its transform is random.
    """
    augment = getattr(dataset, "augment", "none")
    if augment != "none":
        raise RecipeError(
            f"targets.cache cannot be used with data.augment={augment}: a random transform gives "
            "other embeddings every time.",
            "Set data.augment=none or targets.cache=false.",
        )


def image_name(dataset: ImageItems, position: int) -> str:
    """Return the name of an image for messages."""
    name = getattr(getattr(dataset, "source", None), "name", None)
    return str(name(position)) if callable(name) else f"number {position}"
