"""What turns pictures into embeddings, and everything that the numbers depend on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kuea_mllm.data.transforms import ImageTransform, resizable, to_channels_first
from kuea_mllm.errors import DataError
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.fingerprint import fingerprint_tensors
from kuea_mllm.towers.model.tower import Tower

Resizing = Literal["picture", "tensor"]

# What the released evaluation code did (docs/probing.md); each by the name that recipes use.
TENSOR_RESIZE, RAW_PIXELS, CUT_CAPTIONS = "tensor_resize", "raw_pixels", "cut_captions"


@dataclass(frozen=True)
class PixelRule:
    """From a picture to the pixels of a model; holds no model, so it may travel to workers.

    Attributes:
        transform: Size and cut.
        resizing: "picture" resizes with Pillow, as open_clip's own transform does; "tensor" resizes
            the finished tensor (bicubic, no antialias), as the released code does for CIFAR.
    """

    transform: ImageTransform
    resizing: Resizing = "picture"

    @property
    def fingerprint(self) -> str:
        """A name that changes whenever the pixels would."""
        if self.resizing == "picture":
            return self.transform.fingerprint
        return f"tensor-bicubic-v1:{self.transform.image_size}"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return uint8 pixels, (3, height, width): in final size, unless tensors are resized."""
        if self.resizing == "picture":
            return self.transform.to_uint8(image)
        return to_channels_first(resizable(image))

    def finish(self, pixels: Tensor) -> Tensor:
        """Return a batch of uint8 pixels as floats in [0, 1] and in final size."""
        pixels01 = pixels.to(torch.float32) / 255
        if self.resizing == "picture":
            return pixels01
        side = self.transform.image_size
        if pixels01.shape[2] != pixels01.shape[3]:
            raise DataError(
                "the released resizing of tensors is known for square images only (CIFAR), "
                f"found {pixels01.shape[3]} x {pixels01.shape[2]} pixels."
            )
        return interpolate(pixels01, (side, side), mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class ImageEmbedder:
    """A frozen model that embeds pictures.

    Attributes:
        module: Pixels in [0, 1], (n, 3, image_size, image_size), to embeddings (n, width).
        fingerprint: Changes with anything in the model that changes an embedding.
        width: Numbers in one embedding.
        rule: From a picture to its pixels.
        description: For people: what it is and where it came from.
    """

    module: nn.Module
    fingerprint: str
    width: int
    rule: PixelRule
    description: str


def tower_embedder(tower: Tower, *, faults: Sequence[str] = ()) -> ImageEmbedder:
    """Describe a tower with its own preprocessing.

    `Tower.fingerprint` would not do: it leaves out the projection, activation and pixel statistics,
    on which an embedding depends.

    Args:
        tower: The tower; its model is held, not copied.
        faults: Of the released code, `TENSOR_RESIZE` and `RAW_PIXELS` (pixels that are not
            normalised); others mean nothing to images.

    Raises:
        TowerError: If it has no projection.
    """
    encoder = TowerEncoder(tower)
    if RAW_PIXELS in faults:
        encoder.spec = replace(encoder.spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    settings = json.dumps(encoder.spec.to_dict(), sort_keys=True)
    state = sorted(encoder.model.state_dict().items())
    return ImageEmbedder(
        module=encoder,
        fingerprint=fingerprint_tensors([(settings, torch.empty(0)), *state]),
        width=encoder.width,
        rule=PixelRule(
            ImageTransform.from_spec(tower.spec),
            "tensor" if TENSOR_RESIZE in faults else "picture",
        ),
        description=tower.source,
    )


def checksum(pixels: np.ndarray) -> int:
    """Return the crc32 of uint8 pixels."""
    return zlib.crc32(np.ascontiguousarray(pixels).data)
