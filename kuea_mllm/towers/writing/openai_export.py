"""Write a tower into a full OpenAI CLIP state dict, with the text half of a given CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.text_half import (
    OPENAI_ACTIVATION,
    TextHalf,
    openai_heads,
    read_text_half,
    require_same_embedding,
)
from kuea_mllm.towers.writing.save import export_visual, write_state


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
        TowerError: If tower or text half cannot be expressed in the format.
        TowerMismatch: If the base embeds texts in another width.
    """
    spec = tower.spec
    if spec.family != "clip":
        raise TowerError(
            f"{tower.source} is a SigLIP tower, for which OpenAI's format has no place.",
            "Write it with --to hf, --to open_clip or --to visual.",
        )
    # The format states neither activation nor heads nor epsilon: its readers assume these.
    sides = (
        ("vision", tower.source, spec.activation, spec.heads, spec.width, spec.layer_norm_eps),
        ("text", text.source, text.activation, text.heads, text.width, text.layer_norm_eps),
    )
    for side, where, activation, heads, width, eps in sides:
        if activation != OPENAI_ACTIVATION or heads != openai_heads(width) or eps != 1e-5:
            raise TowerError(
                f"{where}: the {side} tower has activation {activation}, {heads} heads for width "
                f"{width} and epsilon {eps:g}; OpenAI's format implies {OPENAI_ACTIVATION}, heads "
                "of width 64 and 1e-05, so every reader would run another model.",
                "Write it with --to hf or --to open_clip, which state them.",
            )
    if text.eos_id is not None:
        raise TowerError(
            f"{text.source}: texts are read at their token {text.eos_id}; OpenAI's format implies "
            "the token with the largest id.",
            "Take the text tower of an OpenAI CLIP.",
        )
    visual = export_visual(tower)
    require_same_embedding(tower, text.embedding_width, text.source)
    rest = dict(text.state)
    if "input_resolution" in rest:
        # The one entry that describes the base's vision half.
        old = rest["input_resolution"]
        size = spec.image_size
        rest["input_resolution"] = torch.full_like(old, size) if isinstance(old, Tensor) else size
    return convert.join_openai(visual, rest)
