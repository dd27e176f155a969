"""LLaVA-1.5 whose image tokens are mixed of two encoders; all else is transformers' own model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from kuea_mllm.adapters.llava_mof.configuration import LlavaMofConfig


class LlavaMofModel(LlavaModel):
    """Both encoders, the map between their widths, projector and language model."""

    config_class = LlavaMofConfig

    def __init__(self, config: LlavaMofConfig) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        expert: Any = config.expert_config
        width = config.vision_config.hidden_size  # type: ignore[union-attr]
        make: Any = AutoModel.from_config
        self.expert_tower = make(expert)
        # Both are 1024 wide in the paper; without this layer a mix of other sizes would be refused.
        self.expert_projection: nn.Module = (
            nn.Identity()
            if expert.hidden_size == width
            else nn.Linear(expert.hidden_size, width, bias=False)
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Return the mixed tokens that the projector reads, (images, patches, width).

        Both encoders are frozen: no gradient reaches them.

        Args:
            pixel_values: Images normalised for the CLIP tower, (images, 3, side, side).
        """
        config: Any = self.config
        with torch.no_grad():
            clip = self._clip_tokens(pixel_values)
            expert = self._expert_tokens(pixel_values)
        share = float(config.clip_share)
        mixed: Tensor = share * clip + (1 - share) * self.expert_projection(expert)
        return mixed

    def get_image_features(
        self, pixel_values: Tensor, **options: Any
    ) -> BaseModelOutputWithPooling:
        """Return projected tokens, one (patches, width) for each image, as `pooler_output`.

        Args:
            pixel_values: As for `image_tokens`.
            options: What transformers passes along; which layers are read is said by the
                configuration alone.
        """
        del options
        projected: Tensor = self.multi_modal_projector(self.image_tokens(pixel_values))
        output: Any = BaseModelOutputWithPooling
        found: BaseModelOutputWithPooling = output(pooler_output=list(projected))
        return found

    def _clip_tokens(self, pixel_values: Tensor) -> Tensor:
        config: Any = self.config
        states = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype), output_hidden_states=True
        ).hidden_states
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        tokens: Tensor = states[config.vision_feature_layer][:, first:]
        return tokens

    def _expert_tokens(self, pixel_values: Tensor) -> Tensor:
        config: Any = self.config
        states = self.expert_tower(
            self._expert_pixels(pixel_values).to(self.expert_tower.dtype), output_hidden_states=True
        ).hidden_states
        prefix = 1 + int(getattr(config.expert_config, "num_register_tokens", 0) or 0)
        tokens: Tensor = states[config.expert_feature_layer][:, prefix:]
        return tokens

    def _expert_pixels(self, pixel_values: Tensor) -> Tensor:
        """Undo CLIP's normalisation, apply the other one, and resize to as many patches."""
        config: Any = self.config
        wide = pixel_values.float()
        mean, std, own_mean, own_std = (
            wide.new_tensor(values).view(3, 1, 1)
            for values in (
                config.clip_mean,
                config.clip_std,
                config.expert_mean or config.clip_mean,
                config.expert_std or config.clip_std,
            )
        )
        pixels = (wide * std + mean - own_mean) / own_std
        side = pixel_values.shape[-1] // config.vision_config.patch_size
        side *= config.expert_config.patch_size
        if side == pixel_values.shape[-1]:
            return pixels
        return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)


class LlavaMofForConditionalGeneration(LlavaForConditionalGeneration):
    """The model with its output layer."""

    config_class = LlavaMofConfig

    def __init__(self, config: LlavaMofConfig) -> None:
        # Not the parent's, which would build a whole LLaVA first.
        LlavaPreTrainedModel.__init__(self, config)  # type: ignore[no-untyped-call]
        text: Any = config.text_config
        self.model = LlavaMofModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]
