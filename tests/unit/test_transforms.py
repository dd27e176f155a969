"""The image transform against open_clip's, and on awkward pictures."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kuea_mllm.data.transforms import ImageTransform


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((width, height), 80).convert(mode)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 15, 32]))
def test_transform_equals_torchvisions(width: int, height: int, side: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose(
        [transforms.Resize(side, bicubic), transforms.CenterCrop(side), transforms.ToTensor()]
    )
    image = picture(width, height)
    assert torch.equal(ImageTransform(side)(image), reference(image))
    squash = transforms.Compose([transforms.Resize((side, side), bicubic), transforms.ToTensor()])
    assert torch.equal(ImageTransform(side, "squash")(image), squash(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    found = ImageTransform(8)(picture(20, 12, "L").convert(mode))
    assert found.shape == (3, 8, 8)
    assert found.dtype == torch.float32
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_alpha_is_dropped_and_not_blended() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert ImageTransform(8)(image)[:, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_palette_with_transparency_does_not_warn() -> None:
    image = picture(20, 12).quantize(8)
    image.info["transparency"] = b"\x00\x10"
    assert ImageTransform(8)(image).shape == (3, 8, 8)


def test_fingerprint_tells_transforms_apart() -> None:
    transforms = [ImageTransform(8), ImageTransform(16), ImageTransform(8, "squash")]
    assert len({t.fingerprint for t in transforms}) == 3


def test_transform_can_be_sent_to_a_worker() -> None:
    transform = ImageTransform(8)
    assert pickle.loads(pickle.dumps(transform)) == transform
