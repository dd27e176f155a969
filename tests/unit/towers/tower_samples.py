"""Tiny random towers in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.model.tower import Tower, architecture, build_model
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, TowerSpec

CLIP = TowerSpec(
    family="clip",
    image_size=16,
    patch_size=8,
    width=64,
    layers=2,
    heads=1,
    mlp_width=128,
    embedding_width=24,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    resize="shortest_edge",
)
SIGLIP = TowerSpec(
    family="siglip",
    image_size=16,
    patch_size=8,
    width=32,
    layers=2,
    heads=2,
    mlp_width=48,
    embedding_width=32,
    activation="gelu",
    layer_norm_eps=1e-6,
    mean=SIGLIP_MEAN,
    std=SIGLIP_STD,
    resize="squash",
)


def canonical(spec: TowerSpec, *, seed: int = 0, with_projection: bool = True) -> convert.State:
    """Return random weights of a spec under canonical names."""
    generator = torch.Generator().manual_seed(seed)
    config, model_class = architecture(spec, has_projection=with_projection)
    model: Any = model_class(config)
    return {
        name: 0.1 * torch.randn(t.shape, generator=generator)
        for name, t in convert.hf_to_canonical(model.state_dict()).items()
    }


def make_tower(spec: TowerSpec, *, seed: int = 0, with_projection: bool = True) -> Tower:
    """Return a random tower."""
    state = canonical(spec, seed=seed, with_projection=with_projection)
    return Tower(build_model(spec, state, where="a sample"), spec, "a sample", "visual")


def visual(seed: int = 0) -> dict[str, Tensor]:
    """Return a random open_clip visual state dict."""
    return convert.canonical_to_visual(canonical(CLIP, seed=seed))


def write_torch(path: Path, content: object) -> Path:
    """Write a file of `torch.save`."""
    torch.save(content, path)
    return path
