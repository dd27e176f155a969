"""A tiny random LLaVA-1.5, complete as a model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava_files import write_tiny_llava

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single file, float32, key names as today's `save_pretrained` writes them. Do not modify."""
    out = tmp_path_factory.mktemp("tiny") / "llava"
    write_tiny_llava(out)
    return out


@pytest.fixture
def variant(tiny_llava: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a copy of the tiny LLaVA in another layout, sharding or dtype."""

    def make(
        *, prefix: str = "", shards: int = 1, dtype: torch.dtype = torch.float32, **config: Any
    ) -> Path:
        out = tmp_path / "variant"
        out.mkdir()
        for file in tiny_llava.iterdir():
            if file.suffix != ".safetensors":
                (out / file.name).write_bytes(file.read_bytes())
        content = json.loads((out / "config.json").read_text()) | config
        (out / "config.json").write_text(json.dumps(content))
        state = {}
        for name, tensor in load_file(tiny_llava / "model.safetensors").items():
            if prefix and name.startswith("vision_tower."):
                name = prefix + name.removeprefix("vision_tower.")  # noqa: PLW2901
            state[name] = tensor.to(dtype)
        _save(state, out, shards)
        return out

    return make


def _save(state: dict[str, torch.Tensor], out: Path, shards: int) -> None:
    metadata = {"format": "pt", "note": "kept"}
    if shards == 1:
        save_file(state, out / "model.safetensors", metadata=metadata)
        return
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        # Contiguous ranges of the sorted names: some shards hold no tensor of the tower.
        first, last = shard * len(names) // shards, (shard + 1) * len(names) // shards
        part = {name: state[name] for name in names[first:last]}
        save_file(part, out / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
