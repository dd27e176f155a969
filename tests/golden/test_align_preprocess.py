"""Image transform, teacher resize and normalisation against stored pixels."""

from __future__ import annotations

import pytest
import torch
from golden_files import absolute_error, align_dir, align_index, files, prefixes, tensors
from PIL import Image
from safetensors import safe_open

from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.teachers import resize_pixels
from kuea_mllm.towers.model.encode import normalise
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD

FILE = "preprocess.safetensors"
PICTURES = prefixes(FILE, ".image_u8")
RESIZES = prefixes(FILE, ".resized01")


@pytest.mark.parametrize("name", files(r".*\.safetensors"))
def test_index_describes_every_tensor_of_a_file(name: str) -> None:
    listed = align_index()["files"][name]["tensors"]
    with safe_open(align_dir() / name, framework="pt") as file:
        assert set(file.keys()) == set(listed)
        for key in listed:
            assert list(file.get_slice(key).get_shape()) == listed[key]["shape"]


def test_clip_constants_are_the_stored_ones() -> None:
    stored = tensors(FILE)
    assert stored["norm_mean"].tolist() == list(CLIP_MEAN)
    assert stored["norm_std"].tolist() == list(CLIP_STD)


@pytest.mark.parametrize("picture", PICTURES)
def test_picture_becomes_the_stored_tensor(picture: str) -> None:
    stored = tensors(FILE)
    expected = stored[f"{picture}.tensor01"]
    transform = ImageTransform(expected.shape[-1])
    found = transform(Image.fromarray(stored[f"{picture}.image_u8"].numpy()))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    normalised = normalise(found[None], CLIP_MEAN, CLIP_STD)[0]
    assert absolute_error(normalised, stored[f"{picture}.clip_input"]) <= 1e-6


@pytest.mark.parametrize("case", RESIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_teacher_resize_is_the_stored_one(case: str, dtype: torch.dtype, tolerance: float) -> None:
    stored = tensors(FILE)
    expected = stored[f"{case}.resized01"]
    found = resize_pixels(stored[f"{case}.tensor01"].to(dtype), expected.shape[-1])
    assert absolute_error(found, expected) <= tolerance
    # Not clamped: the overshoot of the bicubic survives, as in the released code.
    assert abs(float(found.min()) - float(expected.min())) <= tolerance
    normalised = normalise(found, CLIP_MEAN, CLIP_STD)
    assert absolute_error(normalised, stored[f"{case}.target_input"]) <= 4 * tolerance


def test_the_file_holds_every_kind_of_case() -> None:
    assert PICTURES
    assert RESIZES
