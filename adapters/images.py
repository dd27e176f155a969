"""Images as every adapter needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuea_mllm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def as_plain_rgb(image: Image) -> Image:
    """Return an image as RGB, transparency ignored as in the training of LLaVA and most others.

    Raises:
        DataError: If the image cannot be decoded.
    """
    try:
        rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        name = getattr(image, "filename", "") or f"of mode {image.mode}, size {image.size}"
        raise DataError(f"image {name} cannot be decoded: {error}.") from error
    if "transparency" in rgb.info:
        # A converted palette image keeps this note, and transformers would whiten that colour.
        rgb = rgb.copy()
        del rgb.info["transparency"]
    return rgb
