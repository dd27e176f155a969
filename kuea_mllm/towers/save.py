"""Write a tower: as a Hugging Face directory, or as the state dict that open_clip reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kuea_mllm.errors import OutputError, TowerError
from kuea_mllm.io import disk_errors_named, require_free_output, write_json
from kuea_mllm.towers import convert
from kuea_mllm.towers.card import render_card
from kuea_mllm.towers.spec import TowerSpec
from kuea_mllm.towers.tower import Tower

SCHEMA_VERSION = 1

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as stored in a preprocessor_config.json


def save_tower(tower: Tower, directory: Path, *, manifest: dict[str, Any]) -> None:
    """Write a tower as a directory that plain transformers loads.

    Writes `config.json`, `model.safetensors`, `preprocessor_config.json`, `kuea.json` and
    `README.md`. The directory may exist (callers write inside `io.atomic_directory`); none of the
    five files may.

    Args:
        tower: The tower.
        directory: Where to write.
        manifest: Where the tower comes from; JSON values. `schema_version` and `fingerprint` are
            added.

    Raises:
        OutputError: If one of the files exists.
        EnvironmentFailure: If the disk is full.
    """
    directory = Path(directory)
    for name in ("config.json", "model.safetensors", "kuea.json"):
        if (directory / name).exists():
            raise OutputError(f"output {directory / name} exists already.")
    record = {
        "schema_version": SCHEMA_VERSION,
        **manifest,
        "fingerprint": tower.fingerprint,
        "spec": tower.spec.to_dict(),
    }
    with disk_errors_named(directory):
        directory.mkdir(parents=True, exist_ok=True)
        state = {name: t.detach().cpu() for name, t in tower.model.state_dict().items()}
        state = {name: t.contiguous() for name, t in state.items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        write_json(directory / "config.json", _model_config(tower))
        write_json(directory / "preprocessor_config.json", image_processor_config(tower.spec))
        write_json(directory / "kuea.json", record)
        (directory / "README.md").write_text(render_card(record), encoding="utf-8")


def image_processor_config(spec: TowerSpec) -> dict[str, Any]:
    """Return the `preprocessor_config.json` of a spec, for plain `AutoImageProcessor`."""
    side = spec.image_size
    config: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    if spec.resize == "squash":
        return config | {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": side, "width": side},
        }
    return config | {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
    }


def export_visual(tower: Tower) -> convert.State:
    """Return the weights in open_clip's layout: the authors' `visual`, or a timm trunk for SigLIP.

    The inverse of loading, bit for bit.

    Raises:
        TowerError: If a CLIP tower has no projection, which the layout cannot do without.
    """
    state = tower.canonical_state()
    if tower.spec.family == "siglip":
        return convert.canonical_to_trunk(state, tower.source)
    if not tower.has_projection:
        raise TowerError(
            f"{tower.source} has no projection, which the open_clip layout needs.",
            "Export a tower that was loaded with its projection.",
        )
    return convert.canonical_to_visual(state, tower.source)


def save_visual(tower: Tower, path: Path) -> None:
    """Write `export_visual` to a new file, `.safetensors` or (`.pt`, `.pth`) by `torch.save`.

    Raises:
        OutputError: If `path` exists or has another suffix.
        EnvironmentFailure: If the disk is full.
    """
    write_state(export_visual(tower), path)


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict to a new file, `.safetensors` or (`.pt`, `.pth`) by `torch.save`.

    Raises:
        OutputError: If `path` exists or has another suffix.
        EnvironmentFailure: If the disk is full.
    """
    path = Path(path)
    if path.suffix not in {".safetensors", ".pt", ".pth"}:
        raise OutputError(
            f"output {path}: a state dict is written as .safetensors, .pt or .pth, not "
            f"{path.suffix or 'without suffix'!r}."
        )
    require_free_output(path)
    # Cloned: torch.save would write the whole storage behind every slice.
    state = {
        # Plain numbers are among OpenAI's metadata.
        name: value.detach().cpu().clone().contiguous() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
    partial = path.with_name(f".{path.name}.partial")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors_named(path):
            if path.suffix == ".safetensors":
                tensors = {name: torch.as_tensor(value) for name, value in state.items()}
                save_file(tensors, partial, metadata={"format": "pt"})
            else:
                torch.save(state, partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _model_config(tower: Tower) -> dict[str, Any]:
    config: dict[str, Any] = tower.model.config.to_diff_dict()
    # A path of the machine that wrote it is nobody's business and would break reproducibility.
    config.pop("_name_or_path", None)
    config["architectures"] = [type(tower.model).__name__]
    config["dtype"] = str(tower.model.dtype).removeprefix("torch.")
    return config
