"""Pixel values against the original LLaVA code (see llava/index.json)."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kuea_mllm.adapters.images import as_plain_rgb
from kuea_mllm.adapters.llava.images import PaddedImages

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
TENSORS = load_file(GOLDEN / "images" / "images.safetensors")
GEOMETRY: dict[str, Any] = json.loads((GOLDEN / "images" / "geometry.json").read_text())
SETTINGS = json.loads((GOLDEN / "model" / "preprocessor_config.json").read_text())
NAMES = sorted(key.removesuffix(".png_bytes") for key in TENSORS if key.endswith(".png_bytes"))


def decode(name: str) -> Image.Image:
    return Image.open(io.BytesIO(TENSORS[f"{name}.png_bytes"].numpy().tobytes()))


@pytest.mark.parametrize("name", NAMES)
def test_pixel_values_equal_the_original(name: str) -> None:
    # The recorded quirk (three pixels on the long side come out scrambled) is not imitated.
    is_scrambled = max(decode(name).size) == 3
    references = [key for key in TENSORS if key.startswith(f"{name}.pixel_values_")]
    for key in references:
        match = re.fullmatch(r"pixel_values_(\d+)(?:_every(\d+))?", key.removeprefix(f"{name}."))
        assert match is not None, key
        size, stride = int(match[1]), int(match[2] or 1)
        images = PaddedImages(size, SETTINGS["image_mean"], SETTINGS["image_std"])
        values = images([decode(name)])[0]
        assert values.shape == (3, size, size)
        if not is_scrambled:
            worst = (values[:, ::stride, ::stride] - TENSORS[key]).abs().max().item()
            assert worst <= 1e-6, f"{key}: {worst}"
    if not references:
        assert "original_fails_with" in GEOMETRY[name]
        values = PaddedImages(8, SETTINGS["image_mean"], SETTINGS["image_std"])([decode(name)])
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}.rgb" in TENSORS])
def test_rgb_conversion_equals_the_original(name: str) -> None:
    rgb = as_plain_rgb(decode(name))
    assert "transparency" not in rgb.info
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(rgb.height, rgb.width, 3), TENSORS[f"{name}.rgb"])
