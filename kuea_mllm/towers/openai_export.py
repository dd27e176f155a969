"""Write a tower into a full OpenAI CLIP state dict, with the text half of a given CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.io import read_json
from kuea_mllm.towers import checkpoints, convert, keys
from kuea_mllm.towers.open_clip_repository import read_open_clip_state
from kuea_mllm.towers.save import export_visual, write_state
from kuea_mllm.towers.tower import Tower

# The format states neither activation nor heads: its readers assume these.
_ACTIVATION = "quick_gelu"
_HEAD_WIDTH = 64
_CUSTOM_TEXT = "text."


@dataclass(frozen=True)
class TextHalf:
    """Everything of a CLIP model but its vision tower, under OpenAI's names.

    Attributes:
        state: Text tower, projection, logit scale, and OpenAI's metadata where the base has them.
        source: Where it comes from.
    """

    state: Mapping[str, Any]
    source: str

    @property
    def embedding_width(self) -> int:
        """Width of the shared embedding."""
        return int(self.state["text_projection"].shape[1])


def save_openai(tower: Tower, base: str | Path, path: Path) -> None:
    """Write a full OpenAI CLIP state dict: `visual.*` of a tower, everything else of a base.

    The layout of DIVA's and un2CLIP's checkpoints, which OpenAI's and open_clip's builders read.
    Every tensor keeps its value and its dtype.

    Args:
        tower: The vision tower.
        base: Where text tower and logit scale come from; see `read_text_half`.
        path: New file, `.pt`, `.pth` or `.safetensors`.

    Raises:
        TowerError: If the tower or the base cannot be expressed in the format.
        TowerMismatch: If the base embeds texts in another width.
        OutputError: If `path` exists or has another suffix.
        EnvironmentFailure: If the disk is full.
    """
    write_state(export_openai(tower, read_text_half(base)), path)


def export_openai(tower: Tower, text: TextHalf) -> dict[str, Any]:
    """Return the state dict that `save_openai` writes.

    Raises:
        TowerError: If the tower cannot be expressed in the format.
        TowerMismatch: If the base embeds texts in another width.
    """
    spec = tower.spec
    if spec.family != "clip":
        raise TowerError(
            f"{tower.source} is a SigLIP tower, for which OpenAI's format has no place.",
            "Write it with --to hf or --to visual.",
        )
    if spec.activation != _ACTIVATION or spec.heads * _HEAD_WIDTH != spec.width:
        raise TowerError(
            f"{tower.source} has activation {spec.activation} and {spec.heads} heads of width "
            f"{spec.width // spec.heads}; OpenAI's format implies {_ACTIVATION} and heads of width "
            f"{_HEAD_WIDTH}, so every reader would run another model.",
            "Write it with --to hf, which states both.",
        )
    visual = export_visual(tower)
    if text.embedding_width != spec.embedding_width:
        raise TowerMismatch(
            f"{tower.source} embeds images in {spec.embedding_width} numbers, the text tower of "
            f"{text.source} texts in {text.embedding_width}.",
            "Give the CLIP that the tower was made from.",
        )
    rest = dict(text.state)
    if "input_resolution" in rest:
        # The one entry that describes the base's vision half.
        old = rest["input_resolution"]
        size = spec.image_size
        rest["input_resolution"] = torch.full_like(old, size) if isinstance(old, Tensor) else size
    return convert.join_openai(visual, rest)


def read_text_half(base: str | Path) -> TextHalf:
    """Read everything but the vision tower of a CLIP model, under OpenAI's names.

    Args:
        base: A full OpenAI or open_clip state dict file, an open_clip repository, or a Hugging Face
            CLIP directory; the latter two also as Hub ids.

    Raises:
        TowerError: If there is no text half, or it cannot be expressed in OpenAI's format.
    """
    path = checkpoints.resolve_source(base)
    where = str(path)
    if path.is_dir() and not checkpoints.is_open_clip_repository(path):
        state: dict[str, Any] = _read_huggingface(path)
    else:
        if path.is_dir():
            _check_open_clip(path)
        full = read_open_clip_state(path) if path.is_dir() else _read_file(path)
        state = _bare_text({n: t for n, t in full.items() if not n.startswith(keys.VISUAL_PREFIX)})
    missing = {*keys.TEXT_KEYS} - state.keys()
    blocks = convert.count_blocks(state, keys.VISUAL_BLOCK)
    if missing or not blocks:
        raise TowerError(
            f"{where} has no complete text tower: it lacks "
            f"{', '.join(sorted(missing)) or keys.VISUAL_BLOCK + '*'}.",
            "Give a full CLIP: an OpenAI or open_clip state dict, or a Hugging Face directory.",
        )
    # Strict: names every key that is missing or too many.
    convert.openai_text_to_hf(state, where)
    return TextHalf(state, where)


def _read_file(path: Path) -> Mapping[str, Any]:
    content = checkpoints.read_checkpoint_file(path)
    if f"{keys.VISUAL_PREFIX}class_embedding" not in content:
        raise TowerError(
            f"checkpoint {path} is no full CLIP state dict: it holds no visual.class_embedding.",
            "Give the file with both halves, or a Hugging Face CLIP directory.",
        )
    return content


def _bare_text(state: dict[str, Any]) -> dict[str, Any]:
    # open_clip keeps the same text tower below "text." where the model is a CustomTextCLIP.
    return {name.removeprefix(_CUSTOM_TEXT): tensor for name, tensor in state.items()}


def _check_open_clip(directory: Path) -> None:
    path = directory / checkpoints.OPEN_CLIP_CONFIG
    model = read_json(path).get("model_cfg", {})
    text = model.get("text_cfg") or {}
    heads, width = text.get("heads", 8), text.get("width", 512)
    _check_text(path, _ACTIVATION if model.get("quick_gelu") else "gelu", heads, width)


def _read_huggingface(directory: Path) -> dict[str, Any]:
    config = checkpoints.read_config(directory)
    if config.get("model_type") != "clip":
        raise TowerError(
            f"{directory} holds a model of type {config.get('model_type')!r}, not a full CLIP with "
            "a text tower.",
            "Give the directory of a CLIPModel, such as openai/clip-vit-large-patch14.",
        )
    text = config.get("text_config") or {}
    _check_text(
        directory / "config.json",
        text.get("hidden_act", _ACTIVATION),
        text.get("num_attention_heads", 8),
        text.get("hidden_size", 512),
    )
    weights = checkpoints.read_directory_weights(
        directory,
        lambda name: convert.is_other_half(name) and not name.endswith(keys.IGNORED_SUFFIX),
    )
    return convert.hf_text_to_openai(weights, str(directory))


def _check_text(path: Path, activation: str, heads: int, width: int) -> None:
    if activation != _ACTIVATION or heads * _HEAD_WIDTH != width:
        raise TowerError(
            f"{path}: the text tower has activation {activation} and {heads} heads for width "
            f"{width}; OpenAI's format implies {_ACTIVATION} and heads of width {_HEAD_WIDTH}.",
            "Take the text tower of an OpenAI CLIP.",
        )
