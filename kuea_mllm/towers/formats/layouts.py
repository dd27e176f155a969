"""Recognise the layout of a checkpoint and bring it to canonical names."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.files.checkpoints import read_checkpoint_file
from kuea_mllm.towers.formats import convert, keys
from kuea_mllm.towers.formats.unwrap import refuse_foreign, refuse_lora, unwrap
from kuea_mllm.towers.spec import Family

logger = logging.getLogger(__name__)

LAYOUTS = {
    "visual": "open_clip visual state dict (KUEA, FARE, un2CLIP)",
    "openai": "full CLIP state dict of OpenAI or open_clip (DIVA, Long-CLIP, MetaCLIP)",
    "robustvlm": "TeCoA dict around an open_clip visual state dict",
    "trunk": "open_clip SigLIP tower (timm trunk)",
    "open_clip_siglip": "full open_clip SigLIP state dict (timm trunk and text half)",
    "hf": "transformers weights of a CLIP or SigLIP vision tower",
    "hf_directory": "Hugging Face model directory",
    "open_clip_directory": "open_clip repository (open_clip_config.json)",
}

_ROBUSTVLM = "vision_encoder_state_dict"
# Long-CLIP's second table of text positions; no part of the vision half.
LONG_CLIP_POSITIONS = "positional_embedding_res"
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
    content, _ = unwrap_checkpoint(content, where)
    layout = detect_layout(content, where)
    if layout == "robustvlm":
        content = content[_ROBUSTVLM]
        if not isinstance(content, Mapping) or "class_embedding" not in content:
            raise TowerError(f"{where}: {_ROBUSTVLM} holds no open_clip visual state dict.")
    for name, value in content.items():
        if not isinstance(value, Tensor) and name not in keys.OPENAI_METADATA:
            raise TowerError(f"{where}: {name} is a {type(value).__name__}, not a tensor.")
    if layout == "openai":
        known = {name: value for name, value in content.items() if name != LONG_CLIP_POSITIONS}
        content, _ = convert.split_openai(known, where)
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


def unwrap_checkpoint(
    content: Mapping[str, Any], where: str
) -> tuple[Mapping[str, Any], list[str]]:
    """Take off what training tools put around a state dict; see `unwrap.unwrap`."""
    bare, taken_off = unwrap(content, lambda names: match_layout(names) is not None)
    if taken_off:
        logger.info("%s: read without %s.", where, " and ".join(taken_off))
    return bare, taken_off


def detect_layout(names: Iterable[str], where: str) -> str:
    """Return the key of `LAYOUTS` that a checkpoint's top-level names belong to.

    Raises:
        TowerError: If they belong to none; other kinds of models are named, else the first names
            are listed.
    """
    names = [str(name) for name in names]
    refuse_lora(names, where)
    refuse_foreign(names, where)
    layout = match_layout(names)
    if layout is not None:
        return layout
    shown = ", ".join(names[:4]) or "nothing"
    raise TowerError(
        f"{where} is of no known layout; its first keys are: {shown}.{_near_miss(names)}",
        "Known are: " + "; ".join(LAYOUTS.values()) + ".",
    )


def match_layout(names: Collection[str]) -> str | None:
    """Return the key of `LAYOUTS` that top-level names belong to, None if to none."""
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
    return None


def _near_miss(names: list[str]) -> str:
    """Say where the tensors of a tower lie that is hidden below some other prefix."""
    # The bare name last: those of transformers end with it too.
    anchors = (
        _PATCHES,
        "embeddings.class_embedding",
        f"{keys.TRUNK_PREFIX}patch_embed.proj.weight",
        "class_embedding",
    )
    for name in names:
        for anchor in anchors:
            prefix = name.removesuffix(anchor).removesuffix(keys.HF_PREFIX)
            if prefix != name and prefix.endswith("."):
                return (
                    f" A tower lies below {prefix!r} ({name}), among other things: save the keys "
                    "below that prefix alone, without it."
                )
    return ""


def measure(state: Mapping[str, Tensor], layout: str, where: str) -> CheckpointShape:
    """Read the sizes of a tower off its weights (canonical names).

    Raises:
        TowerError: If a weight that tells a size is missing, the positions form no square, or a
            weight is no floating point number.
    """
    family: Family = "clip" if "embeddings.class_embedding" in state else "siglip"
    mlp = f"{keys.HF_BLOCK}0.mlp.fc1.weight"
    convert.refuse_keys(where, missing={_PATCHES, _POSITIONS, mlp} - state.keys(), unknown=())
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise TowerError(
                f"{where}: {name} is {str(tensor.dtype).removeprefix('torch.')}, so these are "
                "quantised weights or none at all.",
                "Give the tower in float32, float16 or bfloat16.",
            )
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
