"""What a checkpoint file says about activation and heads, which no weight holds.

Each rule is open_clip's or timm's own for the layout; where the layout is shared by towers that
differ, there is no rule and the user has to say it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kuea_mllm.towers.files.checkpoints import OPEN_CLIP_WEIGHTS
from kuea_mllm.towers.formats.layouts import CheckpointShape
from kuea_mllm.towers.formats.releases import OPENAI_MAX_WIDTH, RecognisedRelease

Evidence = list[str]

_OPENAI_HEAD_WIDTH = 64
# open_clip's ViT-H, ViT-g, ViT-bigG and ViT-e, all with 16 heads: width / 64 divides and is wrong.
_SIXTEEN_HEADS = frozenset({1280, 1408, 1664, 1792})
_SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
_TRUNKS = ("trunk", "open_clip_siglip")
_OPEN_CLIP_NAMES = re.compile(r"laion|datacomp|commonpool|altogether", re.IGNORECASE)


def implied_activation(shape: CheckpointShape, file_name: str) -> str | None:
    """Return the activation that a file's layout implies, None if it implies none.

    Args:
        shape: Layout and sizes.
        file_name: Of the checkpoint; open_clip's own trainings are told from OpenAI's by it.
    """
    if shape.layout in _TRUNKS:
        return "gelu_pytorch_tanh" if _is_tanh_in_timm(shape) else "gelu"
    if shape.layout != "openai" or shape.width > OPENAI_MAX_WIDTH:
        return None
    # open_clip's own trainings are stored in the same layout, most of them with GELU.
    is_open_clip = file_name in OPEN_CLIP_WEIGHTS or bool(_OPEN_CLIP_NAMES.search(file_name))
    return None if is_open_clip else "quick_gelu"


def implied_heads(shape: CheckpointShape) -> int | None:
    """Return the number of heads by OpenAI's rule width / 64, None where the rule fails."""
    if shape.family == "clip" and shape.width not in _SIXTEEN_HEADS:
        heads, rest = divmod(shape.width, _OPENAI_HEAD_WIDTH)
        return heads if not rest and heads else None
    return None


def explain_activation(
    shape: CheckpointShape, path: Path, releases: Sequence[RecognisedRelease]
) -> tuple[str | None, Evidence]:
    """Return the activation of a checkpoint file as far as it is known, and what that rests on."""
    known = {release.activation for release in releases}
    trained = next(iter(known)) if len(known) == 1 else None
    named = " or ".join(release.name for release in releases)
    is_sure = bool(releases) and releases[0].confidence != "possible"
    implied = implied_activation(shape, path.name)
    if implied is None:
        reason = "not stated: the layout is shared by towers with QuickGELU and with GELU"
        if trained and is_sure:
            return None, [reason, f"{named} was trained with {trained}: --activation {trained}"]
        if trained:
            return None, [reason, f"if it is {named}, pass --activation {trained}"]
        return None, [
            reason,
            "pass --activation quick_gelu (towers that began as OpenAI's) or gelu (most open_clip "
            "trainings)",
        ]
    who = "timm's model of these sizes has" if shape.layout in _TRUNKS else "OpenAI's towers have"
    evidence = [f"not stated; implied by the layout: {who} {implied}"]
    if trained and trained != implied and is_sure:
        return None, [*evidence, f"but {named} was trained with {trained}: --activation {trained}"]
    if is_sure and trained:
        evidence.append(f"{named} was trained with it")
    elif others := [r.name for r in releases if r.activation not in {implied, None}]:
        evidence.append(f"if it is {' or '.join(others)}, pass --activation gelu")
    return implied, evidence


def explain_heads(
    shape: CheckpointShape, releases: Sequence[RecognisedRelease]
) -> tuple[int | None, Evidence]:
    """Return the heads of a checkpoint file as far as they are known, and what that rests on."""
    implied = implied_heads(shape)
    if implied is not None:
        return implied, [f"not stated; OpenAI's rule width / 64 gives {implied}"]
    known = {release.heads for release in releases if release.heads}
    if shape.family == "siglip" and shape.width in _SIGLIP_HEADS:
        heads = _SIGLIP_HEADS[shape.width]
        return None, ["not stated", f"SigLIP towers of this width have {heads}: --heads {heads}"]
    if shape.width in _SIXTEEN_HEADS or known == {16}:
        return None, [
            "not stated; width / 64 does not hold for towers wider than ViT-L",
            f"open_clip's towers of width {shape.width} have 16: pass --heads 16",
        ]
    return None, ["not stated, and no rule applies: pass --heads"]


def _is_tanh_in_timm(shape: CheckpointShape) -> bool:
    """Tell the sizes that timm's registry gives the tanh form (those SigLIP 2 brought)."""
    patch, width = shape.patch_size, shape.width
    return (width, patch) in {(768, 32), (1152, 16), (1536, 16)} or (
        width,
        patch,
        shape.image_size,
    ) == (1024, 16, 512)
