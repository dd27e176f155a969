"""Directories made of the golden LLaVA."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
MODEL = GOLDEN / "model"
TOWER_PREFIX = "model.vision_tower.vision_tower."


def tower_directory(out: Path, state: dict[str, Tensor]) -> Path:
    out.mkdir(parents=True)
    shutil.copy(MODEL / "vision_tower_config.json", out / "config.json")
    shutil.copy(MODEL / "preprocessor_config.json", out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def original_directory(out: Path, state: dict[str, Tensor], tower: Path, *, tokenizer: str) -> Path:
    """A complete directory in the original layout, whose configuration names a local tower."""
    out.mkdir()
    config = json.loads((MODEL / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tower)}))
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(GOLDEN / tokenizer, out, dirs_exist_ok=True)
    return out


def tower_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in state if name.startswith(TOWER_PREFIX)]
    return {name.removeprefix(TOWER_PREFIX): state[name] for name in names}
