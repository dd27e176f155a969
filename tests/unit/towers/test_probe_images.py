"""Probe images: the same everywhere, at every size; pictures, not noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tower_samples import CLIP, SIGLIP

from kuea_mllm.errors import DataError
from kuea_mllm.towers.converting.probe_images import probe_pixels


def test_drawn_images_are_fixed_and_in_range() -> None:
    one, other = probe_pixels(CLIP), probe_pixels(CLIP)
    assert one.shape == (16, 3, 16, 16)
    assert one.dtype == torch.float32
    assert torch.equal(one, other)
    assert 0 <= float(one.min()) < 0.1
    assert 0.9 < float(one.max()) <= 1
    assert torch.equal(probe_pixels(CLIP, count=4), one[:4])


def test_two_sizes_see_the_same_pictures() -> None:
    small, large = (probe_pixels(replace(CLIP, image_size=side)) for side in (32, 96))
    shrunk = torch.nn.functional.interpolate(large, size=(32, 32), mode="area")
    assert float((shrunk - small).abs().mean()) < 0.02


def test_pictures_differ_and_are_no_noise() -> None:
    pixels = probe_pixels(replace(CLIP, image_size=64))
    flat = pixels.flatten(1)
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    assert float((distances + torch.eye(16)).min()) > 0.1
    # Neighbouring pixels are alike, which they are not in noise.
    steps = (pixels[..., 1:] - pixels[..., :-1]).abs()
    assert float(steps.mean()) < 0.05
    assert float(steps.amax((1, 2, 3)).min()) > 0.2  # yet each has edges
    assert float(pixels.std(0).mean()) > 0.15


def test_images_of_a_folder_are_the_first_readable_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("L", (20, 40), 255).save(tmp_path / "a.png")
    Image.new("RGB", (20, 20), (0, 0, 255)).save(tmp_path / "c.jpg")
    (tmp_path / "0.txt").write_text("no image")
    (tmp_path / "folder").mkdir()
    pixels = probe_pixels(CLIP, images=tmp_path, count=2)
    assert pixels.shape == (2, 3, 16, 16)
    assert torch.equal(pixels[0], torch.ones(3, 16, 16))
    assert torch.equal(pixels[1, 0], torch.ones(16, 16))
    assert not pixels[1, 1:].any()
    assert len(probe_pixels(CLIP, images=tmp_path)) == 3


def test_folder_images_are_cropped_or_squashed_as_the_tower_wants(tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 16), (0, 0, 0))
    image.paste((255, 255, 255), (16, 0, 32, 16))
    image.save(tmp_path / "a.png")
    cropped = probe_pixels(CLIP, images=tmp_path)
    assert torch.equal(cropped, torch.ones(1, 3, 16, 16))
    squashed = probe_pixels(SIGLIP, images=tmp_path)
    assert 0.2 < float(squashed.mean()) < 0.5
    assert float(squashed[..., 0].max()) < 0.1


def test_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no readable image"):
        probe_pixels(CLIP, images=tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        probe_pixels(CLIP, images=tmp_path / "gone")
