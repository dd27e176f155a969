"""Tower, resampler and language model of OpenFlamingo, without the output layer."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import CLIPVisionModel

from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig
from kuea_mllm.adapters.openflamingo.language_model import OpenFlamingoLanguageModel
from kuea_mllm.adapters.openflamingo.media import EncodedImages, MediaMask, media_mask
from kuea_mllm.adapters.openflamingo.perceiver import PerceiverResampler
from kuea_mllm.adapters.openflamingo.pretrained import OpenFlamingoPreTrainedModel


class OpenFlamingoModel(OpenFlamingoPreTrainedModel):
    """Tower, resampler and language model without the output layer."""

    def __init__(self, config: OpenFlamingoConfig) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        vision: Any = config.vision_config
        self.vision_tower: nn.Module = CLIPVisionModel(vision)
        self.resampler = PerceiverResampler(config, vision.hidden_size)
        self.language_model = OpenFlamingoLanguageModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.embed_tokens = cast(nn.Embedding, value)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Turn images into the latents that the text attends to.

        Each image is encoded by itself, so the result may be kept and put together anew.

        Args:
            pixel_values: Normalised images, (..., 3, height, width).

        Returns:
            (..., latents, width).
        """
        batch = pixel_values.shape[:-3]
        # Patch tokens of the last block *before* the final norm, which is what the model was
        # trained on; open_clip >= 2.23 would return them after it (fact sheet, trap 1).
        tokens = self.vision_tower(pixel_values=pixel_values.flatten(0, -4)).last_hidden_state
        latents: Tensor = self.resampler(tokens[:, 1:])
        return latents.view(*batch, *latents.shape[1:])

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        images: EncodedImages | None,
        index: Tensor | None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        keep_states: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Run the language model over text and encoded images.

        Args:
            input_ids: (rows, positions); or give `inputs_embeds`.
            attention_mask: (rows, positions of the cache and new ones), or None.
            images: The images of each row, or None.
            index: Image that each position sees, counted from 1, (rows, positions).
            past_key_values: The cache, changed in place, or None.
            inputs_embeds: (rows, positions, width).
            keep_states: Whether to return the states before each layer.

        Returns:
            Final hidden states; and those before each layer with the final ones, or None.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        outputs: tuple[Tensor, tuple[Tensor, ...] | None] = self.language_model(
            inputs_embeds,
            attention_mask,
            images,
            self._mask(images, index),
            past_key_values,
            keep_states=keep_states,
        )
        return outputs

    def _mask(self, images: EncodedImages | None, index: Tensor | None) -> MediaMask | None:
        if images is None or index is None:
            return None
        _, count, latents, _ = images.features.shape
        immediate: bool = self.config.only_attend_immediate_media
        return media_mask(index, count, latents, immediate_only=immediate)
