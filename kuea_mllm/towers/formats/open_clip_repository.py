"""Read an open_clip repository: a directory (or Hub download) with open_clip_config.json.

open_clip itself is asked only about towers on a timm trunk, whose sizes and activation stand in
timm's registry instead of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kuea_mllm.errors import TowerError
from kuea_mllm.io import read_json
from kuea_mllm.towers.files.checkpoints import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    read_checkpoint_file,
)
from kuea_mllm.towers.formats import convert, keys
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD, Preprocessing, Resize, parse_triple

_SIZES = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
_HANDLED = {*_SIZES, "act_kwargs", "norm_kwargs"}
# Without effect in evaluation mode, or on the pooled output.
_TRAINING_ONLY = {"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"}
# What transformers' CLIP has no counterpart for, and the value that switches each of them off.
_OFF: dict[str, Any] = {
    "ls_init_value": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_RESIZE: dict[str, Resize] = {"shortest": "shortest_edge", "squash": "squash"}


@dataclass(frozen=True)
class OpenClipVision:
    """What an open_clip configuration says about its vision tower.

    Attributes:
        heads: Number of attention heads.
        activation: Its name in transformers.
        layer_norm_eps: Epsilon of every LayerNorm.
        image_size: Side of the input in pixels.
        preprocessing: Pixels it expects.
    """

    heads: int
    activation: str
    layer_norm_eps: float
    image_size: int
    preprocessing: Preprocessing


def read_open_clip_state(directory: Path) -> Mapping[str, Any]:
    """Return the full state dict of an open_clip repository, text half included.

    Raises:
        TowerError: If there are no weights, or they are unreadable.
    """
    for name in OPEN_CLIP_WEIGHTS:
        if (directory / name).exists():
            return read_checkpoint_file(directory / name)
    raise TowerError(
        f"directory {directory} has {OPEN_CLIP_CONFIG} but no weights: none of "
        f"{', '.join(OPEN_CLIP_WEIGHTS)}.",
        "Give a complete open_clip repository, or the checkpoint file itself.",
    )


def read_open_clip_tower(directory: Path) -> tuple[convert.State, OpenClipVision]:
    """Read the vision half of an open_clip repository.

    Returns:
        The weights under canonical names, and what the configuration says beside them.

    Raises:
        TowerError: If the tower is of a kind that transformers has no exact counterpart for, or the
            directory is incomplete.
    """
    vision = read_open_clip_config(directory / OPEN_CLIP_CONFIG)
    state = {
        name.removeprefix(keys.VISUAL_PREFIX): tensor
        for name, tensor in read_open_clip_state(directory).items()
        if name.startswith(keys.VISUAL_PREFIX)
    }
    if not state:
        raise TowerError(f"the weights in {directory} hold no key that starts with visual.")
    where = str(directory)
    if any(name.startswith(keys.TRUNK_PREFIX) for name in state):
        return convert.trunk_to_canonical(state, where), vision
    return convert.visual_to_canonical(state, where), vision


def read_open_clip_config(path: Path) -> OpenClipVision:
    """Read `open_clip_config.json`; nothing in it is guessed.

    Raises:
        TowerError: If the tower is of a kind that transformers has no exact counterpart for.
    """
    content: dict[str, Any] = read_json(path)
    model = content.get("model_cfg", content)
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict):
        raise TowerError(f"{path} holds no vision_cfg.", "Is it an open_clip configuration?")
    size = vision.get("image_size", 224)
    sides = size if isinstance(size, list) else [size]
    if len(set(sides)) != 1:
        raise TowerError(f"{path}: images of {size} pixels are not square.")
    preprocessing = _preprocessing(content.get("preprocess_cfg") or {}, sides[0], path)
    if vision.get("timm_model_name"):
        heads, activation, eps = _read_timm_trunk(vision, model.get("embed_dim"), path)
    else:
        heads, activation, eps = _read_plain(vision, bool(model.get("quick_gelu")), path)
    return OpenClipVision(heads, activation, eps, sides[0], preprocessing)


def _read_plain(vision: Mapping[str, Any], quick_gelu: bool, path: Path) -> tuple[int, str, float]:
    if isinstance(vision.get("layers"), list):
        raise TowerError(f"{path} describes a ResNet, not a vision transformer.")
    for key, value in vision.items():
        if key in _HANDLED | _TRAINING_ONLY or key.startswith("timm_"):
            continue
        if key not in _OFF or value != _OFF[key]:
            raise TowerError(
                f"{path}: vision_cfg.{key} is {value!r}, for which transformers' CLIP has no "
                "counterpart.",
                "Take a plain CLIP ViT, such as apple/DFN2B-CLIP-ViT-L-14.",
            )
    act, norm = vision.get("act_kwargs") or {}, vision.get("norm_kwargs") or {}
    for name, given, known in (
        ("act_kwargs", act, {"approximate"}),
        ("norm_kwargs", norm, {"eps"}),
    ):
        if given.keys() - known:
            raise TowerError(f"{path}: vision_cfg.{name} {given!r} is not known.")
    activation = "quick_gelu" if quick_gelu else "gelu"
    if act.get("approximate", "none") != "none":
        activation = f"gelu_pytorch_{act['approximate']}"
    heads = vision.get("width", 768) // vision.get("head_width", 64)
    return heads, activation, float(norm.get("eps", 1e-5))


def _read_timm_trunk(
    vision: Mapping[str, Any], embed_dim: object, path: Path
) -> tuple[int, str, float]:
    from open_clip.timm_model import TimmModel

    name = vision["timm_model_name"]
    pool, projection = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    if pool != "map" or projection not in {"none", ""}:
        raise TowerError(
            f"{path}: the timm trunk {name} is pooled by {pool!r} and projected by "
            f"{projection!r}; only SigLIP's attention pooling without projection is known."
        )
    try:
        with torch.device("meta"):
            visual: Any = TimmModel(
                name, embed_dim=embed_dim, pool=pool, proj=projection, pretrained=False
            )
        found = timm_trunk_facts(visual.trunk)
    except (RuntimeError, AttributeError, TypeError, IndexError) as error:
        raise TowerError(f"{path}: the timm trunk {name} is no SigLIP ViT: {error}.") from error
    if len(found) != 1:
        raise TowerError(
            f"{path}: blocks and pooling of the timm trunk {name} differ in heads, activation or "
            f"norm: {sorted(found)}; transformers' SigLIP has one of each."
        )
    return found.pop()


def timm_trunk_facts(trunk: Any) -> set[tuple[int, str, float]]:
    """Return heads, activation and epsilon of a timm SigLIP: of its blocks, and of its pooling.

    Args:
        trunk: The model; other kinds raise an AttributeError or a TypeError.
    """
    block, pooling = trunk.blocks[0], trunk.attn_pool
    return {
        (int(block.attn.num_heads), _activation_name(block.mlp.act), float(block.norm1.eps)),
        (int(pooling.num_heads), _activation_name(pooling.mlp.act), float(pooling.norm.eps)),
    }


def _activation_name(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else f"gelu_pytorch_{module.approximate}"
    # timm's own classes, used where a factory option asks for them.
    known = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
    if kind not in known:
        raise TypeError(f"its activation {kind} is not known")
    return known[kind]


def _preprocessing(content: Mapping[str, Any], side: int, path: Path) -> Preprocessing:
    # What the file leaves out is what open_clip itself fills in.
    mode = content.get("resize_mode") or "shortest"
    interpolation = content.get("interpolation") or "bicubic"
    if mode not in _RESIZE or interpolation not in {"bicubic", "random"}:
        raise TowerError(
            f"{path}: images are resized by {interpolation}, mode {mode}; only bicubic, and the "
            "modes shortest and squash, are known."
        )
    size = content.get("size")
    if size is not None and set(size if isinstance(size, list) else [size]) != {side}:
        raise TowerError(f"{path}: preprocess_cfg.size is {size}, vision_cfg.image_size {side}.")
    return Preprocessing(
        image_size=side,
        mean=parse_triple(_per_channel(content.get("mean") or CLIP_MEAN), "mean", str(path)),
        std=parse_triple(_per_channel(content.get("std") or CLIP_STD), "std", str(path)),
        resize=_RESIZE[mode],
        resize_to=side,
    )


def _per_channel(value: object) -> object:
    return [value] * 3 if isinstance(value, float | int) else value
