"""Load a vision tower from any format in circulation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig

from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.io import read_json
from kuea_mllm.model_files import image_settings_file
from kuea_mllm.towers.files import checkpoints
from kuea_mllm.towers.formats import convert, keys
from kuea_mllm.towers.formats.evidence import implied_activation, implied_heads
from kuea_mllm.towers.formats.layouts import CheckpointShape, measure, read_file
from kuea_mllm.towers.formats.open_clip_repository import read_open_clip_tower
from kuea_mllm.towers.formats.unwrap import refuse_adapter_directory
from kuea_mllm.towers.model.resize import resize_method, resize_tower
from kuea_mllm.towers.model.tower import Tower, build_model
from kuea_mllm.towers.spec import (
    ACTIVATIONS,
    Preprocessing,
    TowerSpec,
    default_preprocessing,
    parse_preprocessor,
)

logger = logging.getLogger(__name__)

__all__ = ["Tower", "load_tower"]

# model_type in config.json -> configuration class of the vision half.
_VISION_CONFIGS = {
    "clip": CLIPVisionConfig,
    "clip_vision_model": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
}
_LAYER_NORM_EPS = {"clip": 1e-5, "siglip": 1e-6}
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as stored in a preprocessor_config.json


def load_tower(
    source: str | Path,
    *,
    activation: str | None = None,
    heads: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    image_size: int | None = None,
) -> Tower:
    """Load a CLIP or SigLIP vision tower.

    Args:
        source: A Hugging Face directory or Hub id (vision model, or full model whose vision half is
            taken), an open_clip repository (directory or Hub id, by its open_clip_config.json), or
            a checkpoint file of a layout in `formats.layouts.LAYOUTS`.
        activation: "quick_gelu", "gelu" or "gelu_pytorch_tanh". Files do not state it, so bare CLIP
            state dicts need it; a full OpenAI dict implies quick_gelu, a timm trunk gelu.
        heads: Number of attention heads. Files do not state it either; CLIP's rule width / 64 is
            the default where it divides.
        dtype: Dtype of the model's weights; None keeps every tensor in the one it is stored in,
            for a conversion (a model of several dtypes does not run).
        revision: Branch, tag or commit of a Hub id.
        image_size: Side of the images that the tower shall take, in pixels; the position embeddings
            are resized for it as open_clip does. Without it nothing is ever resized.

    Returns:
        The tower, its model in eval mode.

    Raises:
        TowerError: If the source is missing, unreadable, incomplete, of another kind, or does not
            say what is needed.
        TowerMismatch: If the arguments contradict what the source states.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise TowerError(
            f"unknown activation {activation!r}.", f"Known are: {', '.join(ACTIVATIONS)}."
        )
    if heads is not None and heads < 1:
        raise TowerError(f"a tower cannot have {heads} heads.", "Give a number above zero.")
    path = checkpoints.resolve_source(source, revision=revision)
    tower = _load(path, str(source), activation, heads, dtype)
    if image_size is None or image_size == tower.spec.image_size:
        return tower
    logger.info(
        "%s: resized from %d to %d pixels; position embeddings: %s.",
        source,
        tower.spec.image_size,
        image_size,
        resize_method(tower, image_size),
    )
    return resize_tower(tower, image_size)


def _load(
    path: Path,
    source: str,
    activation: str | None,
    heads: int | None,
    dtype: torch.dtype | None,
) -> Tower:
    if path.is_dir():
        refuse_adapter_directory(path)
    if path.is_dir() and checkpoints.is_open_clip_repository(path):
        return _load_open_clip(path, source, activation, heads, dtype)
    if path.is_dir():
        return _load_directory(path, source, activation, heads, dtype)
    state, layout = read_file(path)
    where = f"checkpoint {path}"
    shape = measure(state, layout, where)
    spec = _make_spec(
        shape,
        activation=activation or _implied_activation(shape, where),
        heads=heads or _implied_heads(shape, where),
        layer_norm_eps=_LAYER_NORM_EPS[shape.family],
        preprocessing=default_preprocessing(shape.family),
    )
    model = build_model(spec, state, where=where, dtype=dtype)
    return Tower(model, spec, source, layout)


def read_directory(directory: Path) -> tuple[convert.State, dict[str, Any]]:
    """Read a Hugging Face directory of a CLIP or SigLIP model.

    Returns:
        The vision weights under canonical names, and the vision half's configuration as a plain
        dictionary with every default filled in.

    Raises:
        TowerError: If the directory is incomplete or holds another kind of model.
    """
    content = checkpoints.read_config(directory)
    model_type = str(content.get("model_type"))
    if model_type not in _VISION_CONFIGS:
        raise TowerError(
            f"{directory} holds a model of type {model_type!r}, not a CLIP or SigLIP vision tower.",
            f"Known model types are: {', '.join(_VISION_CONFIGS)}.",
        )
    # Full models keep the vision half in a section of its own.
    vision = content if "vision" in model_type else content.get("vision_config") or {}
    config = _vision_config(directory, _VISION_CONFIGS[model_type], vision)
    state = convert.hf_to_canonical(
        checkpoints.read_directory_weights(directory, lambda n: not convert.is_other_half(n))
    )
    architectures = vision.get("architectures") or content.get("architectures") or []
    claims_projection = model_type == "clip" or "CLIPVisionModelWithProjection" in architectures
    if claims_projection and keys.PROJECTION not in state:
        convert.refuse_keys(str(directory), missing=[keys.PROJECTION], unknown=())
    return state, config


def _vision_config(
    directory: Path, config_class: Callable[..., PretrainedConfig], content: dict[str, Any]
) -> dict[str, Any]:
    skipped = {"model_type", "transformers_version"}
    try:
        config = config_class(**{k: v for k, v in content.items() if k not in skipped})
    except Exception as error:
        # transformers validates with errors of its own, several lines each.
        reason = " ".join(str(error).split())
        raise TowerError(
            f"file {directory / 'config.json'} is no valid vision configuration: {reason}"
        ) from error
    filled: dict[str, Any] = config.to_dict()
    return filled


def _load_directory(
    directory: Path,
    source: str,
    activation: str | None,
    heads: int | None,
    dtype: torch.dtype | None,
) -> Tower:
    state, config = read_directory(directory)
    shape = measure(state, "hf_directory", str(directory))
    where = directory / "config.json"
    _require_stated(where, "hidden_act", config["hidden_act"], activation, "--activation")
    _require_stated(where, "num_attention_heads", config["num_attention_heads"], heads, "--heads")
    shape = _with_stated_size(shape, config["image_size"])
    for key, measured in (
        ("image_size", shape.image_size),
        ("patch_size", shape.patch_size),
        ("hidden_size", shape.width),
        ("num_hidden_layers", shape.layers),
    ):
        if config[key] != measured:
            raise TowerMismatch(
                f"{directory}: config.json says {key} {config[key]}, the weights say {measured}.",
                "The configuration belongs to another tower.",
            )
    spec = _make_spec(
        shape,
        activation=config["hidden_act"],
        heads=config["num_attention_heads"],
        layer_norm_eps=config["layer_norm_eps"],
        preprocessing=_read_preprocessing(directory, shape),
    )
    model = build_model(spec, state, where=str(directory), dtype=dtype)
    return Tower(model, spec, source, "hf_directory", _manifest(directory))


def _load_open_clip(
    directory: Path,
    source: str,
    activation: str | None,
    heads: int | None,
    dtype: torch.dtype | None,
) -> Tower:
    state, stated = read_open_clip_tower(directory)
    shape = measure(state, "open_clip_directory", str(directory))
    shape = _with_stated_size(shape, stated.image_size)
    if shape.image_size != stated.image_size:
        raise TowerMismatch(
            f"{directory}: open_clip_config.json says image_size {stated.image_size}, the weights "
            f"say {shape.image_size}.",
            "The configuration belongs to another tower.",
        )
    where = directory / "open_clip_config.json"
    _require_stated(where, "activation", stated.activation, activation, "--activation")
    _require_stated(where, "heads", stated.heads, heads, "--heads")
    spec = _make_spec(
        shape,
        activation=stated.activation,
        heads=stated.heads,
        layer_norm_eps=stated.layer_norm_eps,
        preprocessing=stated.preprocessing,
    )
    model = build_model(spec, state, where=str(directory), dtype=dtype)
    return Tower(model, spec, source, "open_clip_directory", _manifest(directory))


def _manifest(directory: Path) -> dict[str, Any] | None:
    path = directory / "kuea.json"
    content = read_json(path) if path.exists() else None
    return content if isinstance(content, dict) else None


def _with_stated_size(shape: CheckpointShape, image_size: int) -> CheckpointShape:
    """Return the shape with a stated size that cuts off a rest, such as 384 for patches of 14."""
    if image_size // shape.patch_size == shape.image_size // shape.patch_size:
        return replace(shape, image_size=image_size)
    return shape


def _require_stated(where: Path, key: str, stated: object, given: object, flag: str) -> None:
    if given is not None and given != stated:
        raise TowerMismatch(
            f"{where} says {key} {stated}, {flag} {given} was given.",
            f"Leave {flag} out: the source states it.",
        )


def _read_preprocessing(directory: Path, shape: CheckpointShape) -> Preprocessing:
    found = image_settings_file(directory)
    if found is None:
        chosen = default_preprocessing(shape.family)
        logger.info(
            "%s has no preprocessor_config.json: mean %s, std %s and resize %s are those of the %s "
            "family.",
            directory,
            chosen.mean,
            chosen.std,
            chosen.resize,
            shape.family,
        )
        return chosen
    where, content = found
    parsed = parse_preprocessor(content, str(where))
    if content.get("resample", _BICUBIC) != _BICUBIC:
        logger.warning(
            "%s resizes with filter %s (2 is bilinear), kuea-mllm always with bicubic.",
            where,
            content["resample"],
        )
    for side in (parsed.image_size, parsed.resize_to):
        if side != shape.image_size:
            raise TowerMismatch(
                f"{where} makes images of {parsed.image_size} pixels (resized to "
                f"{parsed.resize_to} first), the tower takes {shape.image_size}.",
                "Only an image processor that resizes and crops to the tower's own size is known.",
            )
    return parsed


def _make_spec(
    shape: CheckpointShape,
    *,
    activation: str,
    heads: int,
    layer_norm_eps: float,
    preprocessing: Preprocessing,
) -> TowerSpec:
    return TowerSpec(
        family=shape.family,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        width=shape.width,
        layers=shape.layers,
        heads=heads,
        mlp_width=shape.mlp_width,
        embedding_width=shape.embedding_width,
        activation=activation,
        layer_norm_eps=layer_norm_eps,
        mean=preprocessing.mean,
        std=preprocessing.std,
        resize=preprocessing.resize,
    )


def _implied_activation(shape: CheckpointShape, where: str) -> str:
    activation = implied_activation(shape, Path(where).name)
    if activation is not None:
        logger.info("%s: activation %s, from its layout (%s).", where, activation, shape.layout)
        return activation
    raise TowerError(
        f"{where} does not state its activation: QuickGELU or GELU. The wrong one would lower "
        "scores without any warning.",
        "Pass --activation quick_gelu (OpenAI's weights and all that were fine-tuned from them, "
        "KUEA's included) or --activation gelu (most open_clip trainings; SigLIP of "
        "transformers: gelu_pytorch_tanh), or give the whole directory if it states it.",
    )


def _implied_heads(shape: CheckpointShape, where: str) -> int:
    heads = implied_heads(shape)
    if heads is not None:
        logger.info("%s: %d attention heads, by OpenAI's rule width / 64.", where, heads)
        return heads
    raise TowerError(
        f"{where} does not state its number of attention heads, and OpenAI's rule width / 64 does "
        f"not apply (a {shape.family} tower of width {shape.width}).",
        "Pass --heads.",
    )
