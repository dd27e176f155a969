"""The MPT language model with the gated blocks in front of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.openflamingo.configuration import (
    OpenFlamingoConfig,
    OpenFlamingoTextConfig,
)
from kuea_mllm.adapters.openflamingo.decoder import OpenFlamingoDecoderLayer, mpt_norm
from kuea_mllm.adapters.openflamingo.media import EncodedImages, MediaMask
from kuea_mllm.adapters.openflamingo.pretrained import OpenFlamingoPreTrainedModel


class OpenFlamingoLanguageModel(OpenFlamingoPreTrainedModel):
    """Embedding, layers and final norm; the tied output layer belongs to the whole model."""

    config_class = OpenFlamingoTextConfig  # type: ignore[assignment]
    base_model_prefix = ""

    def __init__(self, config: OpenFlamingoConfig) -> None:
        text: Any = config.text_config
        super().__init__(text)  # type: ignore[no-untyped-call]
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(
            OpenFlamingoDecoderLayer(config, layer) for layer in range(text.num_hidden_layers)
        )
        self.norm = mpt_norm(text)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        images: EncodedImages | None,
        mask: MediaMask | None,
        past_key_values: Any,
        *,
        keep_states: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Run the layers over embedded text.

        Returns:
            The final norm's output; and, if they are to be kept, the stream before every layer with
            that output at its end.
        """
        rows, queries, _ = hidden_states.shape
        text: Any = self.config
        bias = attention_bias(
            text,
            attention_mask,
            rows=rows,
            queries=queries,
            past=0 if past_key_values is None else past_key_values.get_seq_length(),
            dtype=hidden_states.dtype,
            device=hidden_states.device,
        )
        tokens = None if images is None else images.tokens
        states = []
        for layer in self.layers:
            if keep_states:
                states.append(hidden_states)
            hidden_states = layer(
                hidden_states, bias, tokens, images, mask, past_key_values=past_key_values
            )
        hidden_states = self.norm(hidden_states)
        return hidden_states, (*states, hidden_states) if keep_states else None


def attention_bias(
    config: OpenFlamingoTextConfig,
    attention_mask: Tensor | None,
    *,
    rows: int,
    queries: int,
    past: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Build what is added to the scores: ALiBi, padding and the causal mask.

    Padded and future keys have their bias *replaced* by the smallest number, as in the original. A
    padded position at the left then has nothing but equal scores and looks at all keys alike, which
    nothing real depends on as long as a mask is given.

    ALiBi is measured from the query here, not from the last key: the softmax is the same, and small
    biases stay small, which bfloat16 needs.

    Args:
        config: The language model's configuration.
        attention_mask: (rows, past + queries), true or 1 on real tokens; None hides nothing.
        rows: Rows of the batch.
        queries: New positions.
        past: Positions in the cache.
        dtype: Of the hidden states.
        device: Of the result.

    Returns:
        (rows or 1, heads, queries, past + queries).
    """
    keys = torch.arange(past + queries, device=device)
    distance = keys[None, :] - keys[past:, None]  # 0 or below for what may be seen
    hidden = (distance > 0)[None, None]
    if attention_mask is not None:
        if attention_mask.shape != (rows, past + queries):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected "
                f"{(rows, past + queries)}: every key, those in the cache included."
            )
        hidden = hidden | (attention_mask.to(device) == 0)[:, None, None, :]
    heads = config.num_attention_heads
    bias = torch.zeros(1, heads, queries, past + queries, device=device)
    if config.alibi:
        steps = torch.arange(1, heads + 1, device=device, dtype=torch.float32)
        slopes = torch.exp2(-config.alibi_bias_max * steps / heads)
        bias = slopes[None, :, None, None] * distance
    return bias.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)
