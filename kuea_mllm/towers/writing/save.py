"""Write a tower: as a Hugging Face directory, or as the state dict that open_clip reads."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig

from kuea_mllm.errors import OutputError, TowerError
from kuea_mllm.io import (
    create_directory,
    disk_errors_named,
    follow_umask,
    remove_empty_parents,
    require_free_output,
    write_json,
)
from kuea_mllm.towers.formats import convert, keys
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.text_half import TextHalf, require_same_embedding, text_config
from kuea_mllm.towers.spec import TowerSpec
from kuea_mllm.towers.writing.card import render_card

SCHEMA_VERSION = 1

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as stored in a preprocessor_config.json


def save_tower(
    tower: Tower, directory: Path, *, manifest: dict[str, Any], text: TextHalf | None = None
) -> None:
    """Write a tower as a directory that plain transformers loads.

    Writes `config.json`, `model.safetensors`, `preprocessor_config.json`, `kuea.json` and
    `README.md`. The directory may exist (callers write inside `io.atomic_directory`); none of the
    five files may.

    Args:
        tower: The tower; every tensor keeps its dtype.
        directory: Where to write.
        manifest: Where the tower comes from; JSON values. `schema_version` and `fingerprint` are
            added.
        text: The other half: with it, the directory is that of a full `CLIPModel`, and holds the
            tokenizer's files if the text half came with them.

    Raises:
        TowerError: If there is a text half, but the tower is no CLIP tower with a projection.
        TowerMismatch: If the text half embeds in another width.
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
    state: dict[str, Tensor] = dict(tower.model.state_dict())
    config = _model_config(tower)
    if text is not None:
        config = _full_config(tower, config, text)
        state = convert.canonical_to_hf(tower.canonical_state()) | _text_state(text)
        config["dtype"] = _dtype_name(state)
    with disk_errors_named(directory):
        directory.mkdir(parents=True, exist_ok=True)
        state = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        _write_safetensors(state, directory / "model.safetensors")
        write_json(directory / "config.json", config)
        write_json(directory / "preprocessor_config.json", image_processor_config(tower.spec))
        write_json(directory / "kuea.json", record)
        (directory / "README.md").write_text(render_card(record), encoding="utf-8")
        for path in () if text is None else text.tokenizer:
            shutil.copyfile(path, directory / path.name)


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
            "Give a form of the tower that has it, such as the full CLIP; or write it --to hf.",
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
    with atomic_file(path) as partial:
        if partial.suffix == ".safetensors":
            tensors = {name: _own(torch.as_tensor(value)) for name, value in state.items()}
            _write_safetensors(tensors, partial)
        else:
            # Plain numbers are among OpenAI's metadata.
            torch.save(
                {n: _own(v) if isinstance(v, Tensor) else v for n, v in state.items()}, partial
            )


def require_state_dict_name(path: Path) -> None:
    """Refuse a name that does not say in which of the two file formats to write.

    Raises:
        OutputError: If its suffix is none of `.safetensors`, `.pt`, `.pth`.
    """
    if path.suffix not in {".safetensors", ".pt", ".pth"}:
        raise OutputError(
            f"output {path} is to be a state dict, but its name ends in no suffix of one.",
            "Call it NAME.safetensors, or NAME.pt (NAME.pth) for torch.save.",
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling of a state dict's file, which becomes it when the block succeeds.

    Raises:
        OutputError: If `path` exists or is no name of a state dict.
        EnvironmentFailure: If the disk is full.
    """
    path = Path(path)
    require_state_dict_name(path)
    require_free_output(path)
    parent = path.absolute().parent
    created = create_directory(parent, wanted_for=path)
    partial = parent / f".{path.stem}.partial-{os.getpid()}{path.suffix}"
    try:
        with disk_errors_named(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        if not path.exists():
            remove_empty_parents(parent, created)


def _write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path, metadata={"format": "pt"})
    follow_umask(path)


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that shares no storage with a larger one."""
    tensor = tensor.detach().cpu().contiguous()
    # torch.save would write the whole storage behind a slice, safetensors refuses it.
    is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_whole else tensor.clone()


def widest_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that holds the values of all tensors: what a loader has to build."""
    found = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return functools.reduce(torch.promote_types, found)


def _model_config(tower: Tower) -> dict[str, Any]:
    config: dict[str, Any] = tower.model.config.to_diff_dict()
    # A path of the machine that wrote it is nobody's business and would break reproducibility.
    config.pop("_name_or_path", None)
    config["architectures"] = [type(tower.model).__name__]
    config["dtype"] = _dtype_name(tower.model.state_dict())
    return config


def _full_config(tower: Tower, vision: dict[str, Any], text: TextHalf) -> dict[str, Any]:
    if tower.spec.family != "clip" or not tower.has_projection:
        raise TowerError(
            f"{tower.source} is no CLIP tower with a projection, so no text tower goes with it in "
            "a CLIPModel.",
            "Leave out --text-from.",
        )
    require_same_embedding(tower, text.embedding_width, text.source)
    config: dict[str, Any] = CLIPConfig(
        text_config=text_config(text).to_dict(),
        vision_config={k: v for k, v in vision.items() if k not in ("architectures", "dtype")},
        projection_dim=text.embedding_width,
    ).to_diff_dict()
    config.pop("_name_or_path", None)
    return config | {"architectures": ["CLIPModel"]}


def _text_state(text: TextHalf) -> dict[str, Tensor]:
    bare = {n: t for n, t in text.state.items() if n not in keys.OPENAI_METADATA}
    return convert.openai_text_to_hf(bare, text.source) | {"logit_scale": bare["logit_scale"]}


def _dtype_name(state: Mapping[str, Tensor]) -> str:
    return str(widest_dtype(state)).removeprefix("torch.")
