"""Tuning with mixed image tokens: LLaVA-1.5's samples, and the map between the widths as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.base import TuningFormat, TuningParts
from kuea_mllm.adapters.llava import tuner as llava
from kuea_mllm.adapters.llava.images import padded_images
from kuea_mllm.adapters.llava.prompt import IMAGE_TAG
from kuea_mllm.adapters.llava.runtime import tokens_per_image
from kuea_mllm.adapters.llava.tuning import LlavaConversations
from kuea_mllm.adapters.llava_mof.adapter import resolve_config
from kuea_mllm.adapters.loading import failures_named
from kuea_mllm.adapters.loading import load_for_tuning as load
from kuea_mllm.adapters.vocabulary import count_token_rows, read_tokenizer_files

_LANGUAGE_MODEL = "model.language_model"
_PROJECTOR = "model.multi_modal_projector"
_EXPERT_PROJECTION = "model.expert_projection"
_TOWERS = ("model.vision_tower", "model.expert_tower")
_HEAD = "lm_head"
_ADDITIONS = (IMAGE_TAG, "<pad>")


def tuning_parts(base: Path) -> TuningParts:
    """Return where the parts are; see `MLLMTuner`."""
    config = resolve_config(base)
    # Of one width, the two encoders need no map, and the module holds no weight.
    is_mapped = config.expert_config.hidden_size != config.vision_config.hidden_size
    return TuningParts(
        language_model=_LANGUAGE_MODEL,
        projector=(_PROJECTOR, _EXPERT_PROJECTION) if is_mapped else (_PROJECTOR,),
        vision_tower=_TOWERS[0],
        output_head=_HEAD,
        vocabulary_size=count_token_rows(
            read_tokenizer_files(base), config.text_config.vocab_size, additions=_ADDITIONS
        ),
    )


def tuning_format(base: Path, *, max_length: int) -> TuningFormat:
    """Return how samples are read; see `MLLMTuner`."""
    from transformers import AutoTokenizer

    config = resolve_config(base)
    with failures_named(base, torch.device("cpu")):
        tokenizer = AutoTokenizer.from_pretrained(
            base, local_files_only=True, trust_remote_code=False
        )
    size = int(config.vision_config.image_size)
    return TuningFormat(
        encoder=LlavaConversations(tokenizer, max_length=max_length, where=str(base)),
        preprocess=padded_images(base, size),
        image_token_id=config.image_token_id,
        tokens_per_image=tokens_per_image(config),
        image_size=size,
    )


def build_empty(base: Path) -> nn.Module:
    """Return the model on the meta device."""
    from transformers.initialization import no_init_weights

    from kuea_mllm.adapters.llava_mof.modeling import LlavaMofForConditionalGeneration

    with torch.device("meta"), no_init_weights():
        model: Any = LlavaMofForConditionalGeneration(resolve_config(base))
    model.tie_weights()
    empty: nn.Module = model.eval()
    return empty


def load_for_tuning(
    base: Path, *, dtype: str, device: str, quantization: object | None
) -> nn.Module:
    """Load the model, nothing of it trainable; see `MLLMTuner`."""
    from kuea_mllm.adapters.llava_mof.modeling import LlavaMofForConditionalGeneration

    parts = tuning_parts(base)
    model: nn.Module = load(
        LlavaMofForConditionalGeneration,
        base,
        dtype=dtype,
        device=device,
        quantization=quantization,
        unquantised=(*_TOWERS, *parts.projector, _HEAD),
    )
    return model


def hidden_states(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the output layer reads; see `MLLMTuner`.

    Raises:
        DataError: If there are not as many image tokens as the images take.
    """
    return llava.hidden_states(model, batch, features_of=image_features)


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Return projected mixed tokens, (images, tokens, width); the encoders get no gradient."""
    features: Tensor = model.model.multi_modal_projector(model.model.image_tokens(pixel_values))
    return features
