"""Tuning of LLaVA-1.5: its parts, its training samples, and its forward up to the output layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.base import TuningFormat, TuningParts
from kuea_mllm.adapters.llava.adapter import resolve_config
from kuea_mllm.adapters.llava.images import padded_images
from kuea_mllm.adapters.llava.loading import load_tokenizer
from kuea_mllm.adapters.llava.prompt import IMAGE_TAG
from kuea_mllm.adapters.llava.runtime import tokens_per_image
from kuea_mllm.adapters.llava.tuning import LlavaConversations
from kuea_mllm.adapters.loading import failures_named
from kuea_mllm.adapters.packing import without_rows
from kuea_mllm.adapters.vocabulary import count_token_rows, read_tokenizer_files
from kuea_mllm.errors import DataError, UserError

# Converted models have these behind the vocabulary of the original.
_ADDITIONS = (IMAGE_TAG, "<pad>")


def tuning_parts(base: Path) -> TuningParts:
    """Return where the parts are; see `MLLMTuner`.

    Raises:
        UserError: If configuration and tokenizer do not say which rows stand for tokens.
    """
    return parts_of(resolve_config(base), base)


def parts_of(config: Any, base: Path) -> TuningParts:
    """Return where the parts are of a LLaVA, or of a variant of it.

    Args:
        config: Its configuration.
        base: Its directory.

    Raises:
        UserError: If configuration and tokenizer do not say which rows stand for tokens.
    """
    files = read_tokenizer_files(base)
    rows = config.text_config.vocab_size
    image = config.image_token_id
    if image >= rows:
        raise UserError(
            f"{base / 'config.json'}: image_token_index {image} has no row among the {rows} of "
            "text_config.vocab_size.",
            "Restore config.json from the base model.",
        )
    if image in files.words.values() and image not in files.added.values():
        word = next(text for text, number in files.words.items() if number == image)
        raise UserError(
            f"{base / 'config.json'}: image_token_index {image} is the ordinary token {word!r}.",
            "Restore the tokenizer and the configuration from the base model.",
        )
    return TuningParts(
        language_model="model.language_model",
        projector=("model.multi_modal_projector",),
        vision_tower="model.vision_tower",
        output_head="lm_head",
        vocabulary_size=count_token_rows(files, rows, additions=_ADDITIONS),
    )


def tuning_format(base: Path, *, max_length: int) -> TuningFormat:
    """Return how samples are read; see `MLLMTuner`.

    Raises:
        UserError: If tokenizer or processor are missing or follow another format.
    """
    return format_of(resolve_config(base), base, max_length=max_length)


def format_of(config: Any, base: Path, *, max_length: int) -> TuningFormat:
    """Return how samples of a LLaVA, or of a variant of it, are read.

    Args:
        config: Its configuration.
        base: Its directory.
        max_length: Longest sample in tokens.

    Raises:
        UserError: If tokenizer or processor are missing or follow another format.
    """
    with failures_named(base, torch.device("cpu")):
        tokenizer = load_tokenizer(base)
    size = int(config.vision_config.image_size)
    return TuningFormat(
        encoder=LlavaConversations(tokenizer, max_length=max_length, where=str(base)),
        preprocess=padded_images(base, size),
        image_token_id=config.image_token_id,
        tokens_per_image=tokens_per_image(config),
        image_size=size,
    )


def hidden_states(
    model: Any,
    batch: Mapping[str, Tensor],
    *,
    features_of: Callable[[Any, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return what the output layer reads; see `MLLMTuner`.

    Args:
        model: LLaVA, or a variant of it that differs in what its language model gets of images.
        batch: Inputs of the model.
        features_of: Gives the image features of pixel values; None takes `image_features`.

    Raises:
        DataError: If there are not as many image tokens as the images take.
    """
    inner = model.model
    shape = batch["input_ids"].shape
    batch = without_rows(batch, inner.language_model.config._attn_implementation)
    input_ids = batch["input_ids"]
    embeds: Tensor = inner.language_model.get_input_embeddings()(input_ids)
    if (pixel_values := batch.get("pixel_values")) is not None:
        features = (features_of or image_features)(model, pixel_values).to(embeds.dtype)
        place = input_ids == model.config.image_token_id
        if (found := int(place.sum())) != features[..., 0].numel():
            raise DataError(
                f"a batch has {found} image tokens, its {len(features)} images take "
                f"{features[..., 0].numel()}."
            )
        embeds = embeds.masked_scatter(place.unsqueeze(-1), features)
    output: Tensor = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        use_cache=False,
    ).last_hidden_state
    return output.reshape(*shape, -1)


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Return projected patch tokens, (images, tokens, width).

    The model's own method does the same, but with a graph through the tower as soon as its patch
    embeddings ask for a gradient, as `enable_input_require_grads` makes them do.
    """
    inner, config = model.model, model.config
    with torch.no_grad():
        tower = inner.vision_tower
        states = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
        chosen = config.vision_feature_layer
        layers = [chosen] if isinstance(chosen, int) else chosen
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        tokens = torch.cat([states[layer][:, first:] for layer in layers], dim=-1)
    features: Tensor = inner.multi_modal_projector(tokens)
    return features
