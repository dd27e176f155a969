"""How far the outputs of a new tower are from those of the tower that a base was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kuea_mllm.adapters.base import Tap
from kuea_mllm.diagnostics import TokenDrift, embedding_drift
from kuea_mllm.swapping.report import Check, Drift
from kuea_mllm.towers.converting.probe_images import probe_pixels
from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.model.streaming import Reading, read_outputs
from kuea_mllm.towers.spec import TowerSpec

# Relative drift of the tokens that a frozen MLLM reads. In the mini world (docs/miniworld.md) up to
# 0.05 left LLaVA's answers as they were, 0.09 cost 1.7 points and 0.11 cost 8.8.
TAP_DRIFT_LIMIT = 0.05
# The same tower (align/miniworld, 60 steps) drifted by 0.10 on drawn images and by 0.17 on the mini
# world's own: towers are tuned on photographs and move less on what is unlike them.
DRAWN_DRIFT_LIMIT = 0.03

# Where the tap is not known, the layer that LLaVA made usual is shown, and said so.
PENULTIMATE = Tap((-2,), drops_cls=True)

_MOST_DRAWN = 8
_MOST_OWN = 16
_PROBE_FLOPS = 1e12
_HEAD = "head."


def default_probe_count(spec: TowerSpec) -> int:
    """Return how many probe images are worth their time: 8 of a small tower, 1 of ViT-L/336.

    That one has 576 tokens to compare; both towers together then take about 1e12 floating-point
    operations, seconds on a CPU. Own images are worth more time.
    """
    tokens = spec.grid**2 + spec.prefix_tokens
    per_token = 2 * spec.layers * (4 * spec.width**2 + 2 * spec.width * spec.mlp_width)
    attention = 4 * spec.layers * tokens * spec.width
    per_image = 2 * tokens * (per_token + attention)
    return max(1, min(_MOST_DRAWN, round(_PROBE_FLOPS / per_image)))


def compare_towers(
    spec: TowerSpec,
    base: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    tap: Tap | None,
    *,
    images: Path | None = None,
    count: int | None = None,
) -> Drift:
    """Run both towers on probe images, one block in memory at a time.

    Args:
        spec: How the base runs its tower: activation and normalisation are the base's, because
            those are what the new weights will meet.
        base: The base's own tower, by canonical name.
        new: The new tower, likewise; may hold a projection that the base lacks.
        tap: Which tokens the MLLM reads; None compares the penultimate layer.
        images: Folder of own images; drawn ones otherwise.
        count: Number of images; by default as many as are cheap, or 16 of an own folder.

    Raises:
        DataError: If the folder holds no readable image.
    """
    if count is None:
        count = default_probe_count(spec) if images is None else _MOST_OWN
    pixels = probe_pixels(spec, images=images, count=count)
    read = tap or PENULTIMATE
    reading = Reading(read.layers, read.drops_cls, read.after_norm)
    base, note = _with_pooling(base, new, spec)
    width = new[keys.PROJECTION].shape[0] if keys.PROJECTION in new else spec.width
    spec = replace(spec, embedding_width=width)
    tokens, cosines = TokenDrift(), []
    pooled: list[tuple[Tensor, Tensor]] = []
    # One image at a time where images are large: attention and MLP set the peak of memory.
    for batch in torch.split(pixels, max(1, 2048 // spec.grid**2)):
        own, own_pooled = read_outputs(spec, base, batch, reading, wants_embedding=bool(note))
        moved, new_pooled = read_outputs(spec, new, batch, reading, wants_embedding=bool(note))
        tokens.add(moved, own)
        cosines.append(F.cosine_similarity(moved, own, dim=-1).flatten())
        # A full CLIP of another embedding width has nothing to compare there.
        if (
            own_pooled is not None
            and new_pooled is not None
            and own_pooled.shape == new_pooled.shape
        ):
            pooled.append((new_pooled, own_pooled))
    embedding = None
    if pooled:
        embedding = embedding_drift(*(torch.cat(side) for side in zip(*pooled, strict=True)))
    return Drift(
        images=len(pixels),
        image_source="drawn by kuea-mllm" if images is None else str(images),
        tap=describe_tap(tap) if tap else f"unknown; compared: {describe_tap(read)}",
        limit=DRAWN_DRIFT_LIMIT if images is None else TAP_DRIFT_LIMIT,
        tap_relative=tokens.relative(),
        tap_cosine=float(torch.cat(cosines).mean()),
        embedding=embedding,
        embedding_note=note,
    )


def describe_tap(tap: Tap) -> str:
    """Say in words which tokens an MLLM reads."""
    layers = ", ".join(str(layer) for layer in tap.layers)
    joined = " joined along the width" if len(tap.layers) > 1 else ""
    which = f"hidden states {layers}{joined}" if joined else f"hidden state {layers}"
    tokens = "patches only" if tap.drops_cls else "all tokens"
    return f"{which}, {tokens}, {'after' if tap.after_norm else 'before'} the final norm"


def drift_checks(drift: Drift) -> list[Check]:
    """Judge a drift: at the tokens that are read, and of the embedding for information."""
    over = f"{drift.images} images {drift.image_source}"
    # A NaN fails every comparison, so that it is asked for as "not below".
    is_small = drift.tap_relative <= drift.limit
    checks = [
        Check(
            "drift of the tokens read",
            f"{drift.tap} ({over})",
            f"relative {drift.tap_relative:.4f}, cosine {drift.tap_cosine:.4f}",
            "ok" if is_small else "warn",
            ""
            if is_small
            else f"Above {drift.limit:g} a frozen MLLM began to lose points in the mini world. "
            "Evaluate before use; tune the MLLM after the swap, mix with --interpolate, or align "
            "with objective.patch_preserve_weight.",
        )
    ]
    if drift.embedding is not None:
        found: dict[str, Any] = drift.embedding
        checks.append(
            Check(
                "drift of the embedding",
                drift.embedding_note,
                f"cosine {found['cosine_mean']:.4f}, distance {found['distance_mean']:.4g}; no "
                f"image-text cosine moved by more than {found['bound_max']:.4g} (Proposition 3.2)",
            )
        )
    return checks


def _with_pooling(
    base: Mapping[str, Tensor], new: Mapping[str, Tensor], spec: TowerSpec
) -> tuple[Mapping[str, Tensor], str]:
    """Lend the base's tower what it lacks for an embedding; say whose pooling is used."""
    what = "projection" if spec.family == "clip" else "pooling head"
    pooling = {name: new[name] for name in new if name.startswith((keys.PROJECTION, _HEAD))}
    if not pooling:
        return base, ""
    if pooling.keys() <= base.keys():
        return base, f"with the own {what} of each"
    return Lent(base, pooling), f"with the new tower's {what} for both: the base has none"


class Lent(Mapping[str, Tensor]):
    """A lazy state and a few tensors more; `ChainMap` would do if it took read-only mappings."""

    def __init__(self, state: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> None:
        self._state, self._more = state, more

    def __getitem__(self, name: str) -> Tensor:
        return self._more[name] if name in self._more else self._state[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._state
        yield from (name for name in self._more if name not in self._state)

    def __len__(self) -> int:
        return sum(1 for _ in self)
