"""What the models of OpenFlamingo have in common."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig
from kuea_mllm.adapters.openflamingo.cross_attention import GatedCrossAttention
from kuea_mllm.adapters.openflamingo.perceiver import PerceiverResampler


class OpenFlamingoPreTrainedModel(PreTrainedModel):
    """First values, and how the models may be spread over devices."""

    config_class = OpenFlamingoConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [  # noqa: RUF012
        "OpenFlamingoDecoderLayer",
        "PerceiverResampler",
        "CLIPEncoderLayer",
        "CLIPVisionEmbeddings",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents)
        elif isinstance(module, GatedCrossAttention):
            init.zeros_(module.attention_gate)
            init.zeros_(module.mlp_gate)
