"""Recognise the layout of a checkpoint and bring it to canonical names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.errors import TowerError
from kuea_mllm.towers import convert, keys
from kuea_mllm.towers.checkpoints import (
    is_open_clip_repository,
    read_checkpoint_file,
    resolve_source,
)
from kuea_mllm.towers.spec import Family

LAYOUTS = {
    "visual": "open_clip visual state dict (the KUEA authors' final.pt)",
    "openai": "full OpenAI CLIP state dict (DIVA, un2CLIP)",
    "robustvlm": "RobustVLM / TeCoA dict around an open_clip visual state dict",
    "trunk": "open_clip SigLIP tower (timm trunk)",
    "open_clip_siglip": "full open_clip SigLIP state dict (timm trunk and text half)",
    "hf": "transformers weights of a CLIP or SigLIP vision tower",
    "hf_directory": "Hugging Face model directory",
    "open_clip_directory": "open_clip repository (open_clip_config.json)",
}

_ROBUSTVLM = "vision_encoder_state_dict"
_OPEN_CLIP_TRUNK = keys.VISUAL_PREFIX + keys.TRUNK_PREFIX
_PATCHES = "embeddings.patch_embedding.weight"
_POSITIONS = "embeddings.position_embedding.weight"


@dataclass(frozen=True)
class CheckpointShape:
    """What the weights of a tower tell about it; heads and activation they do not tell.

    Attributes:
        layout: A key of `LAYOUTS`.
        family: "clip" or "siglip".
        image_size: Side of the input in pixels, from the number of positions.
        patch_size: Side of a patch in pixels.
        width: Width of the tokens.
        layers: Number of blocks.
        mlp_width: Hidden width of the blocks' MLP.
        embedding_width: Width of the pooled embedding; `width` without a projection.
        has_projection: Whether the family's pooled embedding can be computed.
        dtype: Dtype of the patch embedding, such as "float32".
    """

    layout: str
    family: Family
    image_size: int
    patch_size: int
    width: int
    layers: int
    mlp_width: int
    embedding_width: int
    has_projection: bool
    dtype: str

    @property
    def description(self) -> str:
        """The layout in words."""
        return LAYOUTS[self.layout]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the description as plain JSON values."""
        return {**asdict(self), "description": self.description}


def describe_checkpoint(path: str | Path) -> CheckpointShape:
    """Name the layout and the sizes of a checkpoint file or of a Hugging Face directory.

    Raises:
        TowerError: If it cannot be read, or its layout is unknown.
    """
    found = resolve_source(path)
    if found.is_dir():
        # A directory says more than its weights do; load_tower reads both.
        if is_open_clip_repository(found):
            from kuea_mllm.towers.open_clip_repository import read_open_clip_tower

            state, _ = read_open_clip_tower(found)
            return measure(state, "open_clip_directory", str(found))
        from kuea_mllm.towers.load import read_directory

        state, _ = read_directory(found)
        return measure(state, "hf_directory", str(found))
    state, layout = read_file(found)
    return measure(state, layout, str(found))


def read_file(path: Path) -> tuple[convert.State, str]:
    """Read a checkpoint file of any known layout.

    Returns:
        Its vision half under canonical names, and the layout's name.

    Raises:
        TowerError: If the file is unreadable, of unknown layout, or not complete.
    """
    return to_canonical(read_checkpoint_file(path), f"checkpoint {path}")


def to_canonical(content: Mapping[str, Any], where: str) -> tuple[convert.State, str]:
    """Bring the content of a checkpoint file to canonical names; see `read_file`."""
    layout = detect_layout(content, where)
    if layout == "robustvlm":
        content = content[_ROBUSTVLM]
        if not isinstance(content, Mapping) or "class_embedding" not in content:
            raise TowerError(f"{where}: {_ROBUSTVLM} holds no open_clip visual state dict.")
    for name, value in content.items():
        if not isinstance(value, Tensor) and name not in keys.OPENAI_METADATA:
            raise TowerError(f"{where}: {name} is a {type(value).__name__}, not a tensor.")
    if layout == "openai":
        content, _ = convert.split_openai(content, where)
    elif layout == "open_clip_siglip":
        content = {
            name.removeprefix(keys.VISUAL_PREFIX): tensor
            for name, tensor in content.items()
            if not name.startswith(("text.", "logit_"))
        }
    if layout == "hf":
        return convert.hf_to_canonical(content), layout
    if layout in {"trunk", "open_clip_siglip"}:
        return convert.trunk_to_canonical(content, where), layout
    return convert.visual_to_canonical(content, where), layout


def detect_layout(names: Mapping[str, Any], where: str) -> str:
    """Return the key of `LAYOUTS` that a checkpoint's top-level names belong to.

    Raises:
        TowerError: If they belong to none; the first names are listed.
    """
    tests: dict[str, Callable[[str], bool]] = {
        "robustvlm": lambda name: name == _ROBUSTVLM,
        "open_clip_siglip": lambda name: name.startswith(_OPEN_CLIP_TRUNK),
        "openai": lambda name: name == f"{keys.VISUAL_PREFIX}class_embedding",
        "visual": lambda name: name == "class_embedding",
        "trunk": lambda name: name.startswith(keys.TRUNK_PREFIX),
        "hf": lambda name: name.removeprefix(keys.HF_PREFIX) == _PATCHES,
    }
    for layout, test in tests.items():
        if any(test(str(name)) for name in names):
            return layout
    shown = ", ".join(str(name) for name in list(names)[:4]) or "nothing"
    raise TowerError(
        f"{where} is of no known layout; its first keys are: {shown}.",
        "Known are: " + "; ".join(LAYOUTS.values()) + ".",
    )


def measure(state: Mapping[str, Tensor], layout: str, where: str) -> CheckpointShape:
    """Read the sizes of a tower off its weights (canonical names).

    Raises:
        TowerError: If a weight that tells a size is missing, or the positions form no square.
    """
    family: Family = "clip" if "embeddings.class_embedding" in state else "siglip"
    mlp = f"{keys.HF_BLOCK}0.mlp.fc1.weight"
    convert.refuse_keys(where, missing={_PATCHES, _POSITIONS, mlp} - state.keys(), unknown=())
    width, _, patch_size, _ = state[_PATCHES].shape
    patches = len(state[_POSITIONS]) - (family == "clip")
    grid = math.isqrt(max(patches, 0))
    if grid * grid != patches or not grid:
        raise TowerError(f"{where}: {_POSITIONS} has {patches} patches, which form no square.")
    projection = state.get(keys.PROJECTION)
    return CheckpointShape(
        layout=layout,
        family=family,
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        layers=convert.count_blocks(state, keys.HF_BLOCK),
        mlp_width=len(state[mlp]),
        embedding_width=width if projection is None else len(projection),
        has_projection=projection is not None or family == "siglip",
        dtype=str(state[_PATCHES].dtype).removeprefix("torch."),
    )
