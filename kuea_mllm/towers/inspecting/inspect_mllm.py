"""Tell what a whole multimodal model is, by its configuration alone.

The tower inside is the business of `swap` and `verify`, which know each model's adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig

from kuea_mllm.errors import TowerError
from kuea_mllm.io import read_json
from kuea_mllm.model_files import image_settings
from kuea_mllm.towers.files.checkpoints import read_config
from kuea_mllm.towers.inspecting.inspection import Inspection

_VISION: dict[str, tuple[str, type[PretrainedConfig]]] = {
    "clip_vision_model": ("clip", CLIPVisionConfig),
    "siglip_vision_model": ("siglip", SiglipVisionConfig),
}
# As transformers names classes that generate text; the original LLaVA's end likewise.
_GENERATING = ("ForConditionalGeneration", "ForCausalLM")
_ORIGINAL_TOWER = "mm_vision_tower"
_SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "mlp_width": "intermediate_size",
}


def is_mllm(directory: Path) -> bool:
    """Tell by its config.json whether a directory is a whole multimodal model.

    Raises:
        TowerError: If there is no readable config.json.
    """
    config = read_config(directory)
    generates = any(name.endswith(_GENERATING) for name in _architectures(config))
    sees = isinstance(config.get("vision_config"), Mapping) or _ORIGINAL_TOWER in config
    return sees and (generates or str(config.get("model_type")).startswith("llava"))


def inspect_mllm(source: str, directory: Path) -> Inspection:
    """Tell what a multimodal model's configuration says of its tower; see `is_mllm`.

    Raises:
        TowerError: If its vision_config is not valid.
    """
    config = read_config(directory)
    vision = config.get("vision_config")
    stated: Mapping[str, Any] = vision if isinstance(vision, Mapping) else {}
    kind = str(stated.get("model_type"))
    family, config_class = _VISION.get(kind, (None, None))
    filled = {} if config_class is None else _fill(directory, config_class, stated)
    warnings = [
        "this is a whole multimodal model, not a tower: `kuea-mllm swap --base` puts a tower into "
        "it, `kuea-mllm verify` tells which one it holds"
    ]
    if _ORIGINAL_TOWER in config:
        warnings.append(
            f"its config.json names the tower {config[_ORIGINAL_TOWER]} ({_ORIGINAL_TOWER}); the "
            "authors' code loads it from there, whatever the weight files hold"
        )
    elif family is None:
        warnings.append(f"its vision model ({kind}) is neither CLIP's nor SigLIP's")
    images = image_settings(directory)
    record = directory / "kuea.json"
    dtype = config.get("dtype") or config.get("torch_dtype")
    return Inspection(
        source=source,
        layout="mllm_directory",
        description=f"whole multimodal model ({', '.join(_architectures(config)) or 'unnamed'}, "
        f"model_type {config.get('model_type')})",
        taken_off=[],
        family=family,
        sizes={name: int(filled[key]) for name, key in _SIZES.items() if key in filled},
        dtype=str(dtype) if dtype else "",
        dtypes={},
        activation=filled.get("hidden_act"),
        activation_evidence=[_evidence(stated, "hidden_act", filled)],
        heads=filled.get("num_attention_heads"),
        heads_evidence=[_evidence(stated, "num_attention_heads", filled)],
        preprocessing={
            name: images[key]
            for name, key in (("mean", "image_mean"), ("std", "image_std"))
            if key in images
        },
        preprocessing_evidence=["stated by the image processor's configuration"] if images else [],
        has_projection=False,
        has_text_tower=False,
        releases=[],
        fingerprint="",
        provenance=read_json(record) if record.is_file() else None,
        warnings=warnings,
    )


def _architectures(config: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in config.get("architectures") or []]


def _fill(
    directory: Path, config_class: type[PretrainedConfig], stated: Mapping[str, Any]
) -> dict[str, Any]:
    skipped = {"model_type", "transformers_version"}
    try:
        config = config_class(**{k: v for k, v in stated.items() if k not in skipped})
    except Exception as error:
        # transformers validates with errors of its own, several lines each.
        reason = " ".join(str(error).split())
        raise TowerError(
            f"file {directory / 'config.json'} has no valid vision_config: {reason}"
        ) from error
    filled: dict[str, Any] = config.to_dict()
    return filled


def _evidence(stated: Mapping[str, Any], key: str, filled: Mapping[str, Any]) -> str:
    if key in stated:
        return f"stated by config.json (vision_config.{key})"
    if key in filled:
        return f"config.json leaves vision_config.{key} out; transformers then takes {filled[key]}"
    return "not stated by config.json"
