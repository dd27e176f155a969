"""A toy MLLM with a small CLIP tower, and its adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kuea_mllm.adapters.base import MLLMRuntime, Tap, TowerSlot
from kuea_mllm.towers.model.tower import Tower, build_model
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD, TowerSpec

SPEC = TowerSpec(
    family="clip",
    image_size=8,
    patch_size=4,
    width=16,
    layers=2,
    heads=2,
    mlp_width=32,
    embedding_width=8,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    resize="shortest_edge",
)


class ToyAdapter:
    name = "toy"

    def __init__(self, mean: tuple[float, ...] | None = CLIP_MEAN) -> None:
        self._mean = mean

    def recognises(self, config: Mapping[str, object]) -> bool:
        return config.get("model_type") == "toy"

    def check_base(self, base: Path) -> None:
        pass

    def tower_slot(self, base: Path) -> TowerSlot:
        config = json.loads((base / "config.json").read_text())["vision_config"]
        tap = Tap((-2,), drops_cls=True)
        return TowerSlot(config, "eye", tap, "clip", self._mean, CLIP_STD)

    def vision_module(self, model: nn.Module) -> nn.Module:
        return model

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        raise NotImplementedError


ADAPTER = ToyAdapter()


def make_tower(seed: int, spec: TowerSpec = SPEC) -> Tower:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        hidden_act=spec.activation,
        projection_dim=spec.embedding_width,
    )
    model = CLIPVisionModelWithProjection(config)
    state = {k.removeprefix("vision_model."): v for k, v in model.state_dict().items()}
    return Tower(build_model(spec, state, where="toy"), spec, f"tower-{seed}", "hf_directory")


def body(tower: Tower) -> dict[str, Tensor]:
    return {k: v for k, v in tower.canonical_state().items() if k != "visual_projection.weight"}


def write_base(
    out: Path,
    *,
    prefix: str = "eye.",
    shards: bool = False,
    dtype: torch.dtype = torch.float32,
    change: Callable[[dict[str, Tensor]], Any] | None = None,
) -> Path:
    out.mkdir()
    vision = {
        "hidden_size": SPEC.width,
        "num_hidden_layers": SPEC.layers,
        "num_attention_heads": SPEC.heads,
        "intermediate_size": SPEC.mlp_width,
        "patch_size": SPEC.patch_size,
        "image_size": SPEC.image_size,
        "hidden_act": SPEC.activation,
        "layer_norm_eps": SPEC.layer_norm_eps,
    }
    (out / "config.json").write_text(json.dumps({"model_type": "toy", "vision_config": vision}))
    (out / "tokenizer.json").write_text("{}")
    (out / "notes").mkdir()
    (out / "notes" / "card.md").write_text("about")
    (out / ".cache").mkdir()
    (out / ".cache" / "state").write_text("hidden")
    eye = {prefix + name: tensor.to(dtype) for name, tensor in body(make_tower(0)).items()}
    # An old counter buffer, which is no part of the tower.
    eye[prefix + "embeddings.position_ids"] = torch.arange(5)[None]
    if change is not None:
        change(eye)
    mouth = {f"mouth.{index}": torch.full((4, 3), float(index), dtype=dtype) for index in range(3)}
    if not shards:
        save_file(eye | mouth, out / "model.safetensors", metadata={"format": "pt"})
        return out
    save_file(eye, out / "model-1.safetensors", metadata={"format": "pt"})
    save_file(mouth, out / "model-2.safetensors", metadata={"format": "pt"})
    index = dict.fromkeys(eye, "model-1.safetensors") | dict.fromkeys(mouth, "model-2.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return out


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
