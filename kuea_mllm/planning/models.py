"""Architectures by name, without weights: shipped data, a local directory, or the Hub's cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kuea_mllm.errors import TowerError

_FULL_MODELS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


@dataclass(frozen=True)
class Architecture:
    """What a vision model is made of.

    Attributes:
        name: Hub id or directory.
        config: Values of its Hugging Face vision configuration, `model_type` among them.
        image_size: Side of the images it is run on unless a recipe says otherwise.
        source: Where the values come from.
    """

    name: str
    config: dict[str, Any]
    image_size: int
    source: str

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def has_projection(self) -> bool:
        """Whether a CLIP tower ends in the projection to its image embedding."""
        is_clip = self.config["model_type"] == "clip_vision_model"
        return is_clip and "CLIPVisionModel" not in self.config.get("architectures", ())

    @property
    def key(self) -> str:
        """The configuration as a string, equal for equal architectures."""
        return json.dumps(self.config, sort_keys=True)


def known_architectures() -> dict[str, Architecture]:
    """Return the architectures that come with the package, by Hub id."""
    return {
        name: Architecture(name, entry["config"], entry["image_size"], entry["source"])
        for name, entry in _known().items()
    }


def find_architecture(reference: str, *, role: str) -> Architecture:
    """Find the architecture of a model; reads no weights and never goes to the network.

    Args:
        reference: Hub id, or directory with a `config.json`.
        role: "student.model" or "teacher.model", for errors.

    Raises:
        TowerError: If nothing here says what the model is made of.
    """
    directory = Path(reference)
    if not directory.is_dir():
        known = known_architectures().get(reference)
        if known is not None:
            return known
        directory = _cached_directory(reference)
    if not (directory / "config.json").is_file():
        raise TowerError(
            f"key '{role}': the sizes of {reference} are not known without its weights.",
            "Give a Hugging Face directory with a config.json, or one of: "
            f"{', '.join(known_architectures())}.",
        )
    return _read_directory(directory, reference)


@cache
def _known() -> dict[str, Any]:
    text = (files("kuea_mllm.planning") / "known_models.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def _cached_directory(reference: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(reference, "config.json")
    except HFValidationError:  # a path that does not exist, or timm:NAME
        return Path(reference)
    return Path(found).parent if isinstance(found, str) else Path(reference)


def _read_directory(directory: Path, reference: str) -> Architecture:
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TowerError(f"file {path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise TowerError(
            f"file {path} states no model_type, so it is no Hugging Face model configuration.",
            "Planning reads Hugging Face configurations only.",
        )
    config = _vision_half(content)
    size = _processor_size(directory) or config.get("image_size")
    if "num_hidden_layers" not in config or not isinstance(size, int):
        raise TowerError(
            f"file {path} (model_type {content['model_type']}) names no number of layers and "
            "image size, so nothing can be counted."
        )
    return Architecture(reference, config, size, str(path))


def _vision_half(content: dict[str, Any]) -> dict[str, Any]:
    vision_type = _FULL_MODELS.get(content["model_type"])
    if vision_type is None:
        return content
    # What a full model's config.json leaves out are the defaults of transformers.
    from transformers import AutoConfig

    full = AutoConfig.for_model(**content)
    config: dict[str, Any] = full.vision_config.to_dict()
    config["model_type"] = vision_type
    config.pop("architectures", None)
    if vision_type == "clip_vision_model":
        config["projection_dim"] = full.projection_dim
    return config


def _processor_size(directory: Path) -> int | None:
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    size = content.get("crop_size") if content.get("do_center_crop") else None
    size = size or content.get("size")
    side = next(iter(size.values()), None) if isinstance(size, dict) else size
    return side if isinstance(side, int) else None
