"""Tuning of LLaVA-1.5: its parts, its training samples, and its forward up to the output layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.base import TuningFormat, TuningParts
from kuea_mllm.adapters.llava.adapter import resolve_config
from kuea_mllm.adapters.llava.images import padded_images
from kuea_mllm.adapters.llava.prompt import IMAGE_TAG
from kuea_mllm.adapters.llava.runtime import tokens_per_image
from kuea_mllm.adapters.llava.tuning import LlavaConversations
from kuea_mllm.adapters.loading import failures_named
from kuea_mllm.adapters.loading import load_for_tuning as load
from kuea_mllm.adapters.packing import without_rows
from kuea_mllm.adapters.vocabulary import count_token_rows, read_tokenizer_files
from kuea_mllm.errors import DataError, UserError

_LANGUAGE_MODEL = "model.language_model"
_PROJECTOR = "model.multi_modal_projector"
_TOWER = "model.vision_tower"
_HEAD = "lm_head"
# Converted models have these behind the vocabulary of the original.
_ADDITIONS = (IMAGE_TAG, "<pad>")


def tuning_parts(base: Path) -> TuningParts:
    """Return where the parts are; see `MLLMTuner`.

    Raises:
        UserError: If configuration and tokenizer do not say which rows stand for tokens.
    """
    config = resolve_config(base)
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
        language_model=_LANGUAGE_MODEL,
        projector=(_PROJECTOR,),
        vision_tower=_TOWER,
        output_head=_HEAD,
        vocabulary_size=count_token_rows(files, rows, additions=_ADDITIONS),
    )


def tuning_format(base: Path, *, max_length: int) -> TuningFormat:
    """Return how samples are read; see `MLLMTuner`.

    Raises:
        UserError: If tokenizer or processor are missing or follow another format.
    """
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
    from transformers import LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model: Any = LlavaForConditionalGeneration(resolve_config(base))
    # Weights that are one on loading are one here, and counted once.
    model.tie_weights()
    empty: nn.Module = model.eval()
    return empty


def load_for_tuning(
    base: Path, *, dtype: str, device: str, quantization: object | None
) -> nn.Module:
    """Load the model, nothing of it trainable; see `MLLMTuner`.

    Raises:
        UserError: If the directory, the dtype or the device is not usable.
    """
    from transformers import LlavaForConditionalGeneration

    model: nn.Module = load(
        LlavaForConditionalGeneration,
        base,
        dtype=dtype,
        device=device,
        quantization=quantization,
        unquantised=(_TOWER, _PROJECTOR, _HEAD),
    )
    return model


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
