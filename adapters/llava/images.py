"""Image preprocessing of LLaVA-1.5: pad to a square, never crop, resize with PIL.

Independent of what the base's own processor configuration says about padding: the published
configurations describe a centre crop, which the model was not trained with and which moves pixel
values by up to 3.8 (fact sheet, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kuea_mllm.adapters.images import as_plain_rgb
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import channel_values, image_settings

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class PaddedImages:
    """Turns PIL images into the pixel values that LLaVA-1.5 was trained with.

    Args:
        image_size: Height and width the tower takes.
        mean: Channel means.
        std: Channel deviations.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        # The torchvision twin resizes differently by one or two levels, so the PIL class it is.
        from PIL.Image import Resampling
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        self._processor = LlavaImageProcessorPil(
            do_pad=True,
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=list(mean),
            image_std=list(std),
            resample=Resampling.BICUBIC,
        )

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Preprocess images.

        Args:
            images: PIL images of any mode and size, at least one.

        Returns:
            Pixel values, (images, 3, image_size, image_size), float32.

        Raises:
            DataError: If an image cannot be decoded.
        """
        rgb = [as_plain_rgb(image) for image in images]
        values: Tensor = self._processor(rgb, return_tensors="pt")["pixel_values"]
        return values


def padded_images(model_dir: Path, image_size: int) -> PaddedImages:
    """Make the preprocessing of a model directory.

    Raises:
        UserError: If its processor configuration has no mean and deviation.
    """
    settings = image_settings(model_dir)
    mean = channel_values(settings, "image_mean", model_dir)
    std = channel_values(settings, "image_std", model_dir)
    if mean is None or std is None:
        raise UserError(
            f"the processor configuration of {model_dir} has no image_mean and image_std.",
            "Restore preprocessor_config.json from the base model.",
        )
    return PaddedImages(image_size, mean, std)
