"""All that is kept can be listed and removed, and what is in use cannot."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kuea_mllm.cli.cache import app
from kuea_mllm.data.folder import FolderImages
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import UserError
from kuea_mllm.probing.embedder import ImageEmbedder, PixelRule
from kuea_mllm.probing.features import Extraction, FeatureStore, extract
from kuea_mllm.workflows.caches import Kept, list_kept

sys.path.insert(0, str(Path(__file__).parents[1] / "probing"))
from probe_data import picture

DAY = 86400


class Mean(torch.nn.Module):
    """Embeds an image as sixteen of its pixels; stops after so many batches."""

    def __init__(self, batches: int | None = None) -> None:
        super().__init__()
        self.left = batches

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return pixels.flatten(1)[:, :16] - 0.5


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    (tmp_path / "images").mkdir()
    for number in range(6):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    return FolderImages(tmp_path / "images")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def embed(
    images: FolderImages, root: Path, *, name: str = "tower", batches: int | None = None
) -> FeatureStore:
    rule = PixelRule(ImageTransform(8))
    embedder = ImageEmbedder(Mean(batches), name, 16, rule, f"runs/{name}")
    return extract(images, embedder, Extraction(workers=0, batch_size=2, cache=root))


def only(root: Path, kind: str) -> Kept:
    [found] = [each for each in list_kept(root) if each.kind == kind]
    return found


def test_features_are_listed_with_model_images_and_completeness(
    images: FolderImages, root: Path
) -> None:
    store = embed(images, root)
    found = only(root, "features")
    assert (found.name, found.model) == (store.key.digest, "runs/tower")
    assert (found.done, found.count, found.unit) == (6, 6, "images")
    assert found.is_complete
    assert found.bytes >= 6 * 16 * 4
    assert found.details["first_image"] == images.name(0)
    assert (found.details["width"], found.details["precision"]) == (16, "float32")


def test_interrupted_features_are_listed_as_incomplete(
    images: FolderImages, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kuea_mllm.probing.features.SHARD_ROWS", 2)
    with pytest.raises(KeyboardInterrupt):
        embed(images, root, batches=2)
    found = only(root, "features")
    assert (found.done, found.count, found.is_complete) == (4, 6, False)


def test_embeddings_are_written_from_time_to_time(
    images: FolderImages, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kuea_mllm.probing.features.SHARD_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        embed(images, root, batches=1)
    assert only(root, "features").done == 2
    assert embed(images, root).computed == 4


def test_reading_features_is_use_and_listing_is_not(images: FolderImages, root: Path) -> None:
    store = embed(images, root)
    os.utime(store.directory / "features.json", (0, 0))
    assert only(root, "features").used == 0
    assert only(root, "features").used == 0
    embed(images, root)
    assert only(root, "features").used > DAY


def test_removed_features_stay_readable_where_they_are_read(
    images: FolderImages, root: Path
) -> None:
    store = embed(images, root)
    before = np.array(store.embeddings)
    only(root, "features").remove()
    assert not store.directory.exists()
    assert np.array_equal(store.embeddings, before)
    assert embed(images, root).computed == 6


def test_features_that_are_being_computed_are_not_removed(images: FolderImages, root: Path) -> None:
    store = embed(images, root)
    descriptor = os.open(store.directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being computed by another process"):
            only(root, "features").remove()
    finally:
        os.close(descriptor)
    assert embed(images, root).computed == 0


@pytest.mark.parametrize("damage", ["no statement", "no rows", "moved"])
def test_damaged_features_are_listed_as_such_and_removed(
    images: FolderImages, root: Path, damage: str
) -> None:
    store = embed(images, root)
    if damage == "no statement":
        (store.directory / "features.json").unlink()
    elif damage == "no rows":
        (store.directory / "embeddings.npy").unlink()
    else:
        store.directory.rename(store.directory.with_name("features-0000"))
    found = only(root, "features")
    expected = {"no statement": "is missing", "no rows": "is missing", "moved": "named by"}
    assert expected[damage] in (found.problem or "")
    assert not found.is_complete
    found.remove()
    assert list_kept(root) == []


def test_small_files_of_a_kind_are_one_entry(root: Path) -> None:
    for folder, names in {
        "probing": (
            "classes-1.npy",
            "classes-2.npy",
            ".classes-3.npy.partial-7.npy",
            "captions-1.npy",
        ),
        "tar_index": ("a.npz",),
        "retrieval": ("b.npy",),
    }.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).write_bytes(b"x")
    found = {each.name: each for each in list_kept(root)}
    assert {name: each.count for name, each in found.items()} == {
        "class-vectors": 2,
        "captions": 1,
        "tar-index": 1,
        "demonstrations": 1,
    }
    for each in found.values():
        each.remove()
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_mixture_is_listed_and_removed(root: Path) -> None:
    folder = root / "mixtures" / f"{'c' * 32}-1"
    folder.mkdir(parents=True)
    (folder / "mixture.json").write_text(json.dumps({"source": "mix.json", "records": 7}))
    found = only(root, "mixture")
    assert (found.name, found.model, found.count, found.unit) == (
        "c" * 16,
        "mix.json",
        7,
        "records",
    )
    found.remove()
    assert not folder.exists()


def test_table_fits_and_prune_removes_what_is_old(images: FolderImages, root: Path) -> None:
    old, new = embed(images, root, name="old"), embed(images, root, name="new")
    listed = CliRunner().invoke(app, ["ls", f"--dir={root}"])
    assert listed.exit_code == 0, listed.stderr
    heads = [line for line in listed.stdout.splitlines() if old.key.digest in line]
    assert "whole" in heads[0]
    assert len(heads[0]) <= 80
    assert "runs/old (16 numbers, float32)" in listed.stdout
    assert "first image:" in listed.stdout
    os.utime(old.directory / "features.json", (0, 0))
    asked = CliRunner().invoke(app, ["prune", f"--dir={root}"], input="n\n")
    assert old.key.digest in asked.stdout
    assert old.directory.exists()
    pruned = CliRunner().invoke(app, ["prune", f"--dir={root}", "--yes"])
    assert f"removed {old.key.digest} (features" in pruned.stdout
    assert not old.directory.exists()
    assert new.directory.exists()
    again = CliRunner().invoke(app, ["prune", f"--dir={root}", "--yes"])
    assert "nothing in" in again.stdout
