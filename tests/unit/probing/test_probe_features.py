"""Features are computed once, go on where they stopped, and never belong to another tower."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probe_data import picture, write_clip
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from kuea_mllm.data.folder import FolderImages
from kuea_mllm.errors import DataError, TowerError, UnreadableImage
from kuea_mllm.probing import features
from kuea_mllm.probing.embedder import RAW_PIXELS, TENSOR_RESIZE, ImageEmbedder, tower_embedder
from kuea_mllm.probing.features import Extraction, extract
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower

COUNT = 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    write_clip(place)
    return place


@pytest.fixture
def tower(directory: Path) -> Tower:
    return load_tower(directory)


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        # Without compression, so that all files are of one size.
        picture(number).save(tmp_path / "images" / f"{number:02}.bmp")
    return FolderImages(tmp_path / "images")


@pytest.fixture
def how(tmp_path: Path) -> Extraction:
    return Extraction(workers=0, batch_size=4, cache=tmp_path / "cache")


class Failing(torch.nn.Module):
    """Passes images on until it has seen `images` of them."""

    def __init__(self, module: torch.nn.Module, images: int) -> None:
        super().__init__()
        self.module, self.left = module, images

    def forward(self, pixels: Any) -> Any:
        self.left -= len(pixels)
        if self.left < 0:
            raise KeyboardInterrupt
        return self.module(pixels)


def rows_of(tower: Tower, images: FolderImages) -> np.ndarray:
    embedder = tower_embedder(tower)
    pixels = torch.stack([embedder.rule.transform(images.read(i)) for i in range(len(images))])
    with torch.no_grad():
        return embedder.module(pixels).numpy()


def test_features_are_those_of_the_tower_and_computed_once(
    tower: Tower, images: FolderImages, how: Extraction
) -> None:
    first = extract(images, tower_embedder(tower), how)
    assert first.embeddings.dtype == np.float32
    assert np.abs(first.embeddings - rows_of(tower, images)).max() < 1e-5
    assert first.computed == COUNT
    again = extract(images, tower_embedder(tower), how)
    assert again.computed == 0
    assert np.array_equal(again.embeddings, first.embeddings)


def test_interrupted_extraction_goes_on_and_equals_one_run(
    tower: Tower,
    images: FolderImages,
    how: Extraction,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(features, "SHARD_ROWS", 8)
    embedder = tower_embedder(tower)
    failing = dataclasses.replace(embedder, module=Failing(embedder.module, 14))
    with pytest.raises(KeyboardInterrupt):
        extract(images, failing, how)
    resumed = extract(images, embedder, how)
    assert resumed.computed == COUNT - 8
    whole = extract(images, embedder, dataclasses.replace(how, cache=tmp_path / "other"))
    assert np.array_equal(resumed.embeddings, whole.embeddings)


def test_features_of_another_tower_or_setting_are_never_used(
    tower: Tower, images: FolderImages, how: Extraction
) -> None:
    seen = {extract(images, tower_embedder(tower), how).key.digest}
    state = tower.model.state_dict()
    state["visual_projection.weight"] *= 1.5  # no part of Tower.fingerprint
    other = extract(images, tower_embedder(tower), how)
    assert other.computed == COUNT
    seen.add(other.key.digest)
    for faults in ([RAW_PIXELS], [TENSOR_RESIZE]):
        seen.add(tower_embedder_key(tower, images, how, faults))
    seen.add(tower_embedder_key(tower, images, dataclasses.replace(how, dtype="bfloat16"), []))
    assert len(seen) == 5


def test_store_in_the_place_of_another_is_refused(
    tower: Tower, images: FolderImages, how: Extraction
) -> None:
    first = extract(images, tower_embedder(tower), how)
    other = tower_embedder(tower, faults=[RAW_PIXELS])
    second = extract(images, other, how)
    shutil.rmtree(second.directory)
    shutil.copytree(first.directory, second.directory)
    with pytest.raises(DataError, match="is not the one it is named by"):
        extract(images, other, how)


def tower_embedder_key(
    tower: Tower, images: FolderImages, how: Extraction, faults: list[str]
) -> str:
    if TENSOR_RESIZE in faults:  # square pictures only
        for index in range(COUNT):
            picture(index, (24, 24)).save(images.name(index))
        images = FolderImages(images.folder)
    store = extract(images, tower_embedder(tower, faults=faults), how)
    assert store.computed == COUNT
    return store.key.digest


def test_nan_features_are_refused_by_image(
    tower: Tower, images: FolderImages, how: Extraction
) -> None:
    class Nan(torch.nn.Module):
        calls = 0

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            Nan.calls += 1
            rows = torch.ones(len(pixels), 16)
            if Nan.calls == 3:
                rows[1, 5] = torch.nan
            return rows

    embedder = dataclasses.replace(tower_embedder(tower), module=Nan())
    with pytest.raises(TowerError, match=r"image .*/09\.bmp holds NaN or infinity \(float32\)"):
        extract(images, embedder, how)


def test_damaged_rows_are_refused(tower: Tower, images: FolderImages, how: Extraction) -> None:
    store = extract(images, tower_embedder(tower), how)
    path = store.directory / "embeddings.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="rows 0 to 19 are not what was written"):
        extract(images, tower_embedder(tower), how)
    path.write_bytes(content[:-40])
    with pytest.raises(DataError, match=r"embeddings\.npy is truncated"):
        extract(images, tower_embedder(tower), how)


def test_changed_image_of_the_same_name_and_size_is_noticed(
    tower: Tower, images: FolderImages, how: Extraction
) -> None:
    extract(images, tower_embedder(tower), how)
    picture(99).save(images.name(0))
    with pytest.raises(DataError, match=r"00\.bmp changed since the cache"):
        extract(FolderImages(images.folder), tower_embedder(tower), how)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_in_one_line(
    tower: Tower, images: FolderImages, how: Extraction, workers: int
) -> None:
    Path(images.name(5)).write_bytes(b"BM, but no picture")
    with pytest.raises(UnreadableImage, match=r"^image \S+05\.bmp cannot be read") as caught:
        extract(images, tower_embedder(tower), dataclasses.replace(how, workers=workers))
    assert "Traceback" not in str(caught.value)


def test_released_resizing_is_that_of_the_tensor(tower: Tower) -> None:
    picture_32 = picture(3, (32, 32))
    right, released = tower_embedder(tower), tower_embedder(tower, faults=[TENSOR_RESIZE])

    def pixels(embedder: ImageEmbedder) -> torch.Tensor:
        return embedder.rule.finish(torch.from_numpy(embedder.rule(picture_32))[None])

    raw = torch.from_numpy(released.rule(picture_32))[None].float() / 255
    expected = resize(raw, [16, 16], InterpolationMode.BICUBIC, antialias=False)
    assert torch.allclose(pixels(released), expected, atol=1e-6)
    assert (pixels(right) - pixels(released)).abs().max() > 1e-3


def test_raw_pixels_are_those_without_normalisation(tower: Tower) -> None:
    raw = tower_embedder(tower, faults=[RAW_PIXELS])
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = tower.model(pixel_values=pixels).image_embeds
        assert torch.equal(raw.module(pixels), expected)
        assert not torch.allclose(tower_embedder(tower).module(pixels), expected, atol=1e-2)
