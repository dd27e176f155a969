"""Read a source for `inspect`: its vision half, and whatever beside it says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.io import read_json
from kuea_mllm.model_files import image_settings_file
from kuea_mllm.towers.files.checkpoints import (
    OPEN_CLIP_CONFIG,
    read_checkpoint_file,
    read_config,
    read_directory_weights,
)
from kuea_mllm.towers.formats.layouts import (
    CheckpointShape,
    detect_layout,
    measure,
    to_canonical,
    unwrap_checkpoint,
)
from kuea_mllm.towers.formats.open_clip_repository import read_open_clip_state, read_open_clip_tower
from kuea_mllm.towers.formats.unwrap import refuse_lora
from kuea_mllm.towers.reading.load import read_directory
from kuea_mllm.towers.spec import Preprocessing, default_preprocessing, parse_preprocessor

_TEXT_TOKENS = ("token_embedding.weight", "embeddings.token_embedding.weight")


@dataclass(frozen=True)
class Stated:
    """Activation and heads where a configuration states them, and where it does."""

    activation: str
    why_activation: str
    heads: int
    why_heads: str


@dataclass(frozen=True)
class Findings:
    """What was read of a source.

    Attributes:
        state: The vision half under canonical names.
        shape: Its layout and sizes.
        names: All names in the checkpoint, text half included.
        dtypes: Types of the tensors, text half included where it is in the same dictionary.
        preprocessing: Pixels it expects.
        preprocessing_evidence: What that rests on.
        taken_off: What stood around the state dict.
        stated: Activation and heads as a configuration states them, None without one.
        text_positions: Length of the text half's position table.
        vocabulary: Rows of the text half's token table.
        called: Names that its configuration gives it.
    """

    state: Mapping[str, Tensor]
    shape: CheckpointShape
    names: frozenset[str]
    dtypes: frozenset[str]
    preprocessing: Preprocessing
    preprocessing_evidence: str
    taken_off: list[str] = field(default_factory=list)
    stated: Stated | None = None
    text_positions: int | None = None
    vocabulary: int | None = None
    called: tuple[str, ...] = ()


def read_file_findings(path: Path) -> Findings:
    """Read a checkpoint file.

    Raises:
        TowerError: If it is unreadable, incomplete, or holds no CLIP or SigLIP tower.
    """
    where = f"checkpoint {path}"
    content, taken_off = unwrap_checkpoint(read_checkpoint_file(path), where)
    detect_layout(content, where)
    state, layout = to_canonical(content, where)
    shape = measure(state, layout, where)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    positions = tensors.get("positional_embedding") if layout == "openai" else None
    return Findings(
        state=state,
        shape=shape,
        names=frozenset(content),
        dtypes=_dtype_names(tensors or state),
        preprocessing=default_preprocessing(shape.family),
        preprocessing_evidence=f"not stated; the {shape.family} family's own",
        taken_off=taken_off,
        text_positions=None if positions is None else len(positions),
        vocabulary=_vocabulary(tensors),
    )


def read_directory_findings(path: Path) -> Findings:
    """Read a Hugging Face model directory.

    Raises:
        TowerError: If it is unreadable, incomplete, or holds no CLIP or SigLIP tower.
    """
    names = _names_in_directory(path)
    refuse_lora(names, str(path))
    state, config = read_directory(path)
    raw = read_config(path)
    section = "" if "vision" in str(raw.get("model_type")) else "vision_config"
    stated = raw.get(section, {}) if section else raw
    shape = measure(state, "hf_directory", str(path))
    if config["image_size"] // shape.patch_size == shape.image_size // shape.patch_size:
        shape = replace(shape, image_size=config["image_size"])
    images = image_settings_file(path)
    has_text = any(name.startswith("text_model.") for name in names)
    text = raw.get("text_config") or {} if has_text else {}
    called = raw.get("_name_or_path")
    return Findings(
        state=state,
        shape=shape,
        names=frozenset(names),
        dtypes=_dtype_names(state),
        preprocessing=parse_preprocessor(images[1], str(images[0]))
        if images
        else default_preprocessing(shape.family),
        preprocessing_evidence=f"stated by {images[0].name}"
        if images
        else f"not stated; the {shape.family} family's own",
        stated=Stated(
            activation=config["hidden_act"],
            why_activation=_stated(stated, section, "hidden_act", config),
            heads=config["num_attention_heads"],
            why_heads=_stated(stated, section, "num_attention_heads", config),
        ),
        text_positions=text.get("max_position_embeddings"),
        vocabulary=text.get("vocab_size"),
        called=(called,) if isinstance(called, str) and called else (),
    )


def read_open_clip_findings(path: Path) -> Findings:
    """Read an open_clip repository.

    Raises:
        TowerError: If it is unreadable, incomplete, or holds no CLIP or SigLIP tower.
    """
    state, vision = read_open_clip_tower(path)
    content = read_open_clip_state(path)
    shape = measure(state, "open_clip_directory", str(path))
    if vision.image_size // shape.patch_size == shape.image_size // shape.patch_size:
        shape = replace(shape, image_size=vision.image_size)
    raw = read_json(path / OPEN_CLIP_CONFIG)
    model = raw.get("model_cfg", raw)
    trunk = model["vision_cfg"].get("timm_model_name")
    named = f"the timm model {trunk}" if trunk else "vision_cfg and quick_gelu"
    origin = f"stated by {OPEN_CLIP_CONFIG} ({named})"
    return Findings(
        state=state,
        shape=shape,
        names=frozenset(content),
        dtypes=_dtype_names(content),
        preprocessing=vision.preprocessing,
        preprocessing_evidence=f"stated by {OPEN_CLIP_CONFIG} (open_clip's defaults filled in)",
        stated=Stated(vision.activation, origin, vision.heads, origin),
        vocabulary=(model.get("text_cfg") or {}).get("vocab_size"),
    )


def _names_in_directory(path: Path) -> list[str]:
    names: list[str] = []

    def note(name: str) -> bool:
        names.append(name)
        return False

    read_directory_weights(path, note)
    return names


def _stated(stated: Mapping[str, Any], section: str, key: str, filled: Mapping[str, Any]) -> str:
    full = f"{section}.{key}" if section else key
    if key in stated:
        return f"stated by config.json ({full})"
    return f"config.json leaves {full} out; transformers then takes {filled[key]}"


def _vocabulary(tensors: Mapping[str, Tensor]) -> int | None:
    rows = [len(t) for name, t in tensors.items() if name.endswith(_TEXT_TOKENS) and t.dim() == 2]
    return rows[0] if len(rows) == 1 else None


def _dtype_names(tensors: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(
        str(t.dtype).removeprefix("torch.")
        for t in tensors.values()
        if isinstance(t, Tensor) and t.is_floating_point()
    )
