"""What a conversion may change beside the format: dtype, image size, share of the original tower.

Each only happens when it is asked for, and each is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.errors import TowerMismatch
from kuea_mllm.towers.converting.parity import PROBES, outputs_of_tower
from kuea_mllm.towers.converting.probe_images import probe_pixels
from kuea_mllm.towers.files.checkpoints import resolve_source
from kuea_mllm.towers.model.mix import mix_states
from kuea_mllm.towers.model.resize import resize_method, resize_tower
from kuea_mllm.towers.model.tower import Tower, build_model
from kuea_mllm.towers.reading.load import load_tower

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Changes:
    """What is asked for beside the format.

    Attributes:
        dtype: Dtype of all tensors, a key of `DTYPES`; None keeps each in its own.
        image_size: New image size in pixels; None keeps it.
        original: Tower to mix with; None mixes nothing.
        weight: Share of the source in the mix, in [0, 1].
    """

    dtype: str | None = None
    image_size: int | None = None
    original: str | None = None
    weight: float = 1.0


def load_original(original: str, tuned: Tower, activation: str | None, heads: int | None) -> Tower:
    """Load the tower to mix with; what a file does not state is what the tuned tower has.

    Raises:
        TowerError: If it cannot be read.
        TowerMismatch: If it is of another architecture, or takes other pixels.
    """
    path = resolve_source(original)
    stated = (
        (None, None) if path.is_dir() else (activation or tuned.spec.activation, tuned.spec.heads)
    )
    found = load_tower(original, activation=stated[0], heads=heads or stated[1], dtype=None)
    different = [
        f"{name} {value} and {tuned.spec.to_dict()[name]}"
        for name, value in found.spec.to_dict().items()
        if value != tuned.spec.to_dict()[name]
    ]
    if different:
        raise TowerMismatch(
            f"{original} and {tuned.source} cannot be mixed, they differ in "
            f"{', '.join(different)}.",
            "Give the tower that the tuned one was made from.",
        )
    return found


def apply_changes(
    source: Tower, original: Tower | None, changes: Changes
) -> tuple[Tower, dict[str, Any]]:
    """Return the tower as asked for, and what that did to it.

    Args:
        source: The tower as it is stored.
        original: The tower to mix with, if any; see `load_original`.
        changes: What is asked for.

    Returns:
        The changed tower (the source itself if nothing was asked), and one entry for each change
        that had an effect, with the drift of the embeddings on probe images.

    Raises:
        TowerMismatch: If the towers cannot be mixed, or a dtype cannot hold the values.
        TowerError: If the image size is no multiple of the patch size.
    """
    tower, made = source, dict[str, Any]()
    if original is not None:
        tower = _mixed(original, tower, changes.weight)
        made["interpolate"] = {
            "weight": changes.weight,
            "original": changes.original,
            "original_fingerprint": original.fingerprint,
            "tuned_fingerprint": source.fingerprint,
            **_drift(source, tower),
        }
    if changes.image_size is not None and changes.image_size != tower.spec.image_size:
        resized = resize_tower(tower, changes.image_size)
        made["image_size"] = {
            "from": tower.spec.image_size,
            "to": changes.image_size,
            "position_embeddings": resize_method(tower, changes.image_size),
            **_drift(tower, resized),
        }
        tower = resized
    dtypes = dtype_names(tower.canonical_state())
    if changes.dtype not in (None, dtypes):
        cast, rounding = _cast(tower, DTYPES[changes.dtype])
        made["dtype"] = {"from": dtypes, "to": changes.dtype, **rounding}
        if rounding["largest_error"]:
            made["dtype"] |= _drift(tower, cast)
        tower = cast
    return tower, made


def _mixed(original: Tower, tuned: Tower, weight: float) -> Tower:
    if weight in (0.0, 1.0):
        # Not a mix: that tower itself, in its own dtype.
        return replace(tuned if weight else original, source=tuned.source, manifest=tuned.manifest)
    state = mix_states(original.canonical_state(), tuned.canonical_state(), weight)
    model = build_model(tuned.spec, state, where=tuned.source, dtype=None)
    return replace(tuned, model=model)


def _cast(tower: Tower, dtype: torch.dtype) -> tuple[Tower, dict[str, Any]]:
    """Return the tower in another dtype, and the largest rounding with the tensor it is in."""
    state = tower.canonical_state()
    largest, where = 0.0, None
    for name, tensor in state.items():
        rounded = tensor.detach().to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise TowerMismatch(
                f"{tower.source}: {name} has values that {str(dtype).removeprefix('torch.')} "
                "cannot hold, or that are not finite.",
                "Take bfloat16, or leave --dtype out.",
            )
        error = float((rounded.double() - tensor.detach().double()).abs().max())
        if error > largest:
            largest, where = error, name
    if where is not None:
        logger.warning("the cast rounds: by %.3g at most, in %s.", largest, where)
    model = build_model(tower.spec, state, where=tower.source, dtype=dtype)
    return replace(tower, model=model), {"largest_error": largest, "tensor": where}


def _drift(before: Tower, after: Tower) -> dict[str, Any]:
    """Measure how far a change moved the embeddings, each tower at its own image size."""
    one, other = (
        outputs_of_tower(tower, probe_pixels(tower.spec, count=PROBES)) for tower in (before, after)
    )
    if one.embedding is None or other.embedding is None:
        return {}
    first, second = one.embedding.double(), other.embedding.double()
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=-1)
    return {
        "embedding_cosine_mean": float(cosine.mean()),
        "embedding_relative_l2": float((second - first).norm() / first.norm()),
        "images": PROBES,
    }


def dtype_names(state: Mapping[str, Tensor]) -> str:
    """Return the dtypes of a state dict, joined by "+"."""
    return "+".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()}))
