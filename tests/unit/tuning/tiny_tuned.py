"""A tiny LLaVA to put LoRA layers into."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from kuea_mllm.adapters.base import TuningParts

PARTS = TuningParts(
    language_model="model.language_model",
    projector=("model.multi_modal_projector",),
    vision_tower="model.vision_tower",
    output_head="lm_head",
    vocabulary_size=50,
)


def tiny_model() -> Any:
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                **vision, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=8
            ),
            text_config=LlamaConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
            ),
            image_token_index=51,
        )
    )
