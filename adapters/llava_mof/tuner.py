"""Tuning with mixed image tokens: LLaVA-1.5's samples, and the map between the widths as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.adapters.base import TuningFormat, TuningParts
from kuea_mllm.adapters.llava import tuner as llava
from kuea_mllm.adapters.llava_mof.adapter import resolve_config

_EXPERT = "model.expert_tower"
_EXPERT_PROJECTION = "model.expert_projection"


def tuning_parts(base: Path) -> TuningParts:
    """Return where the parts are; see `MLLMTuner`.

    Raises:
        UserError: If configuration and tokenizer do not say which rows stand for tokens.
    """
    config = resolve_config(base)
    parts = llava.parts_of(config, base)
    # Of one width, the two encoders need no map, and the module holds no weight.
    is_mapped = config.expert_config.hidden_size != config.vision_config.hidden_size
    projector = (*parts.projector, _EXPERT_PROJECTION) if is_mapped else parts.projector
    return replace(parts, projector=projector, other_encoders=(_EXPERT,))


def tuning_format(base: Path, *, max_length: int) -> TuningFormat:
    """Return how samples are read; see `MLLMTuner`.

    Raises:
        UserError: If tokenizer or processor are missing or follow another format.
    """
    return llava.format_of(resolve_config(base), base, max_length=max_length)


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
