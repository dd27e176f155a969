"""Targets from the cache are those of the live towers."""

import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kuea_mllm.alignment.target_build import build_missing
from kuea_mllm.alignment.target_cache import (
    CachedImages,
    CachedTargets,
    open_stores,
    original_embedder,
    probe_storage,
    teacher_embedder,
)
from kuea_mllm.alignment.targets import LiveTargets
from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.open import open_images
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import DataError
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.images import write_images
from kuea_mllm.teachers import load_teacher
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.reading.load import load_tower

COUNT, BATCH = 48, 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "images"
    write_images(path, split="train", count=COUNT, seed=0)
    return path


@pytest.fixture(scope="module")
def towers():
    return load_teacher(ASSETS / "teacher"), load_tower(ASSETS / "clip")


def opened(root, folder, towers, precision):
    teacher, tower = towers
    dataset = ImageDataset(open_images(str(folder)), ImageTransform.from_spec(tower.spec))
    encoder = TowerEncoder(tower)
    embedders = {
        "teacher_0": teacher_embedder(teacher, description="teacher"),
        "original": original_embedder(encoder, description="original"),
    }
    size = tower.spec.image_size
    embedders = {
        name: probe_storage(embedder, image_size=size, device=CPU, precision=precision)
        for name, embedder in embedders.items()
    }
    stores = open_stores(
        root,
        source_fingerprint=dataset.source.fingerprint(),
        population=len(dataset),
        transform_fingerprint=dataset.transform.fingerprint,
        embedders=embedders,
        precision=precision,
    )
    return dataset, embedders, stores, encoder


def cached_and_live(root, folder, towers, *, precision="fp32", size=BATCH, **live_settings):
    """Yield the targets of each batch from a cache, and from the towers themselves."""
    dataset, embedders, stores, encoder = opened(root, folder, towers, precision)
    build_missing(
        stores,
        dataset,
        np.arange(len(dataset)),
        embedders,
        device=CPU,
        batch_size=BATCH,
        precision=precision,
    )
    live = LiveTargets([towers[0]], encoder, CPU, **live_settings)
    cached = CachedTargets(live if live_settings else None)
    for batch in DataLoader(CachedImages(dataset, stores), batch_size=size):
        batch["pixels"] = batch["pixels"].float() / 255
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            yield cached(batch), live(batch)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_targets_are_the_live_ones_bit_for_bit(tmp_path, folder, towers, precision):
    for cached, live in cached_and_live(tmp_path, folder, towers, precision=precision):
        assert torch.equal(cached.original.pooled, live.original.pooled)
        assert torch.equal(cached.teachers[0].pooled, live.teachers[0].pooled)
        assert cached.original.pooled.dtype == live.original.pooled.dtype
        assert cached.teachers[0].pooled.dtype == live.teachers[0].pooled.dtype
        assert cached.original.patches is None


@pytest.mark.parametrize("size", [1, 7, 48])
def test_batches_of_another_size_differ_by_float_rounding_only(tmp_path, folder, towers, size):
    for cached, live in cached_and_live(tmp_path, folder, towers, size=size):
        for ours, theirs in (
            (cached.original.pooled, live.original.pooled),
            (cached.teachers[0].pooled, live.teachers[0].pooled),
        ):
            assert ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max() <= 1e-6


def test_patch_tokens_come_from_the_towers_and_pooled_ones_from_the_cache(
    tmp_path, folder, towers, monkeypatch
):
    settings = {"patch_layer": -2, "teacher_patches": True}
    for cached, live in cached_and_live(tmp_path, folder, towers, **settings):
        assert torch.equal(cached.original.patches, live.original.patches)
        assert torch.equal(cached.teachers[0].patches, live.teachers[0].patches)
        assert torch.equal(cached.teachers[0].pooled, live.teachers[0].pooled)

    def refuse(*_, **__):
        raise AssertionError("the teacher was run although its patch tokens are not needed")

    dataset, _, stores, encoder = opened(tmp_path, folder, towers, "fp32")
    live = LiveTargets([towers[0]], encoder, CPU, patch_layer=-2)
    monkeypatch.setattr(live, "teacher_features", refuse)
    batch = next(iter(DataLoader(CachedImages(dataset, stores), batch_size=4)))
    batch["pixels"] = batch["pixels"].float() / 255
    targets = CachedTargets(live)(batch)
    assert targets.original.patches is not None
    assert targets.teachers[0].patches is None


def test_a_projection_that_changed_is_another_original(tmp_path, folder, towers):
    # The fingerprint of a tower leaves its projection out, because MLLMs do not carry it.
    _, _, before, encoder = opened(tmp_path, folder, towers, "fp32")
    weight = encoder.model.visual_projection.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        _, _, after, _ = opened(tmp_path, folder, towers, "fp32")
    finally:
        with torch.no_grad():
            weight.copy_(original)
    assert before["original"].directory != after["original"].directory
    assert before["teacher_0"].directory == after["teacher_0"].directory


def test_a_picture_that_was_exchanged_is_named(tmp_path, towers):
    folder = tmp_path / "images"
    write_images(folder, split="train", count=20, seed=0)
    for _ in cached_and_live(tmp_path / "cache", folder, towers):
        pass
    dataset, _, stores, _ = opened(tmp_path / "cache", folder, towers, "fp32")
    cached = CachedImages(dataset, stores)
    first, second = (dataset.source.name(position) for position in (0, 1))
    with open(second, "rb") as file:  # noqa: PTH123 - names are plain strings
        other = file.read()
    with open(first, "wb") as file:  # noqa: PTH123
        file.write(other)
    with pytest.raises(DataError, match=f"{os.path.basename(first)} changed"):  # noqa: PTH119
        cached[0]
