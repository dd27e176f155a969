"""What the configuration and the shapes of the released files say about the model they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kuea_mllm.adapters.openflamingo import keys
from kuea_mllm.adapters.openflamingo.configuration import (
    OpenFlamingoConfig,
    OpenFlamingoTextConfig,
)
from kuea_mllm.errors import UserError

Shapes = Mapping[str, Sequence[int]]

# The released code builds these sizes whatever the configuration says.
_HEADS = 8
_HEAD_WIDTH = 64
_LAYER_NORM_EPS = 1e-5

# Settings of the language model that this code does not have, and the value that means "off".
_OFF: dict[str, tuple[object, ...]] = {
    "attn_clip_qkv": (None,),
    "logit_scale": (None,),
    "prefix_lm": (False, None),
    "attn_uses_sequence_id": (False, None),
    "softmax_scale": (None,),
    "embedding_fraction": (1.0, 1),
    "attn_pdrop": (0.0, 0),
    "emb_pdrop": (0.0, 0),
    "resid_pdrop": (0.0, 0),
}
_LANGUAGE_MODELS = {"mosaic_gpt": "MPT-1B"}


def text_config(
    config: Mapping[str, Any], *, vocabulary: int, where: str
) -> OpenFlamingoTextConfig:
    """Translate the configuration of a released language model.

    Args:
        config: Content of its `config.json`.
        vocabulary: Rows of the embedding in the checkpoint.
        where: What to call it in errors.

    Raises:
        UserError: If it is another language model, or uses something this code does not have.
    """
    kind = config.get("model_type")
    if kind not in _LANGUAGE_MODELS:
        raise UserError(
            f"{where}: the language model is of type {kind!r}; only mosaic_gpt (MPT-1B, "
            "OpenFlamingo-3B and its Instruct variant) is supported.",
            "OpenFlamingo-4B and -9B have other language models.",
        )
    for key, off in _OFF.items():
        if config.get(key, off[0]) not in off:
            raise UserError(
                f"{where}: {key} is {config[key]!r}, which this model does not have "
                f"(expected {off[0]!r})."
            )
    for key in ("alibi", "no_bias"):
        if config.get(key) is not True:
            raise UserError(f"{where}: {key} is {config.get(key)!r}; MPT-1B says true.")
    for key in ("d_model", "mlp_ratio", "n_layers", "n_heads", "max_seq_len"):
        if not isinstance(config.get(key), int):
            raise UserError(
                f"{where}: {key} is {config.get(key)!r}, a whole number was expected.",
                "Restore config.json from the language model's release.",
            )
    width = int(config["d_model"])
    return OpenFlamingoTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * int(config["mlp_ratio"]),
        num_hidden_layers=int(config["n_layers"]),
        num_attention_heads=int(config["n_heads"]),
        max_position_embeddings=int(config["max_seq_len"]),
        alibi_bias_max=int(config.get("alibi_bias_max", 8)),
        qk_norm=bool(config.get("attn_qk_ln", False)),
    )


def released_text_config(text: OpenFlamingoTextConfig) -> dict[str, Any]:
    """Return the `config.json` of a language model in its released form, as `text_config` reads it.

    Raises:
        UserError: If the released form cannot say it.
    """
    ratio, rest = divmod(text.intermediate_size, text.hidden_size)
    if rest or text.layer_norm_eps != _LAYER_NORM_EPS:
        raise UserError(
            f"text_config: intermediate_size {text.intermediate_size} of hidden_size "
            f"{text.hidden_size} with layer_norm_eps {text.layer_norm_eps} has no released form."
        )
    return {
        **{key: values[0] for key, values in _OFF.items()},
        "model_type": "mosaic_gpt",
        "architectures": ["MosaicGPT"],
        "alibi": True,
        "alibi_bias_max": text.alibi_bias_max,
        "attn_qk_ln": text.qk_norm,
        "d_model": text.hidden_size,
        "max_seq_len": text.max_position_embeddings,
        "mlp_ratio": ratio,
        "n_heads": text.num_attention_heads,
        "n_layers": text.num_hidden_layers,
        "no_bias": True,
        "vocab_size": text.vocab_size,
    }


def model_config(
    checkpoint: Shapes,
    language_model: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    *,
    image_token_id: int,
    endofchunk_token_id: int,
    where: str = "the checkpoint",
) -> OpenFlamingoConfig:
    """Derive the configuration of a released model from its parts.

    Args:
        checkpoint: Shapes of the trained part by plain name.
        language_model: Content of the language model's `config.json`.
        vision_config: The tower's configuration (keys of `CLIPVisionConfig`).
        image_token_id: Id of `<image>` in the tokenizer with the added tokens.
        endofchunk_token_id: Id of `<|endofchunk|>`.
        where: What to call the checkpoint in errors.

    Raises:
        UserError: If the parts do not fit one another.
    """
    needed = (keys.RELEASED_EMBEDDING, "perceiver.latents")
    if missing := [name for name in needed if name not in checkpoint]:
        raise UserError(
            f"{where} lacks {missing[0]}: it is not the trained part of an OpenFlamingo with an "
            "MPT language model."
        )
    rows, text_width = checkpoint[keys.RELEASED_EMBEDDING]
    text = text_config(
        language_model, vocabulary=int(rows), where="the language model's config.json"
    )
    latents, width = checkpoint["perceiver.latents"]
    for what, found, expected in (
        ("language model's width", text.hidden_size, text_width),
        ("tower's width", vision_config.get("hidden_size"), width),
    ):
        if found != expected:
            raise UserError(
                f"{where} is for another model: the {what} is {found}, the checkpoint was trained "
                f"with {expected}."
            )
    gated = keys.gated_layers_of(checkpoint)
    first = gated[0] if gated else 0
    block = f"lang_encoder.transformer.blocks.{first}.gated_cross_attn_layer."
    config = OpenFlamingoConfig(
        vision_config={**vision_config, "model_type": "clip_vision_model"},
        text_config=text,
        perceiver_depth=keys.perceiver_depth_of(checkpoint),
        num_latents=int(latents),
        resampler_heads=_HEADS,
        resampler_head_dim=_HEAD_WIDTH,
        resampler_ff_mult=_ratio(checkpoint, "perceiver.layers.0.1.1.weight", where),
        cross_attention_every=first + 1,
        cross_attention_heads=_HEADS,
        cross_attention_head_dim=_HEAD_WIDTH,
        cross_attention_ff_mult=_ratio(checkpoint, f"{block}ff.1.weight", where),
        image_token_id=image_token_id,
        endofchunk_token_id=endofchunk_token_id,
        eos_token_id=endofchunk_token_id,
    )
    expected_layers = gated_layers(config)
    if gated != expected_layers:
        raise UserError(
            f"{where} has gated blocks before the decoder layers {gated}; with "
            f"{text.num_hidden_layers} layers and one in {first + 1} they should be "
            f"{expected_layers}.",
            "Is this the language model that the checkpoint was trained with?",
        )
    return config


def gated_layers(config: OpenFlamingoConfig) -> list[int]:
    """Return the decoder layers with a gated block in front, numbered from 0."""
    text: Any = config.text_config
    every = config.cross_attention_every
    return list(range(every - 1, text.num_hidden_layers, every))


def _ratio(shapes: Shapes, name: str, where: str) -> int:
    if name not in shapes:
        raise UserError(f"{where} lacks {name}.")
    hidden, width = shapes[name]
    return int(hidden // width)
