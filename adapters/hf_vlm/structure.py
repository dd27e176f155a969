"""Where the vision tower sits in a model of transformers, found by classes and not by names."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import CLIPVisionModel, GenerationMixin, PreTrainedModel, SiglipVisionModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from kuea_mllm.adapters.base import Tap
from kuea_mllm.adapters.hf_vlm.readers import READERS, Reader
from kuea_mllm.adapters.projector import ProjectorInput
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError

LOGGER = logging.getLogger("kuea_mllm")

# Exactly these: classes derived from them, or copied from them under another name, may compute
# something else from tensors of the same names and shapes.
FAMILIES: dict[type[nn.Module], str] = {CLIPVisionModel: "clip", SiglipVisionModel: "siglip"}

_OWN_CODE = "Models that bring their own code (auto_map, trust_remote_code) cannot be used."


@dataclass(frozen=True)
class FoundTower:
    """A tower inside of a model.

    Attributes:
        path: Dotted path of the module.
        module: The tower.
        holder: The module it is a part of, which reads its tokens.
        family: "clip" or "siglip".
    """

    path: str
    module: PreTrainedModel
    holder: nn.Module
    family: str


@dataclass(frozen=True)
class TowerOutline:
    """What a configuration says about its tower; see `TowerSlot`."""

    path: str
    family: str
    vision_config: Mapping[str, Any]
    tap: Tap | None
    projector: ProjectorInput | None


def find_tower(model: nn.Module, where: str) -> FoundTower:
    """Find the tower for images in a model, on any device.

    Args:
        model: A model of transformers, or something that holds one.
        where: What to call it in messages.

    Raises:
        UserError: If there is no tower of a family we know, or several and none is known to be the
            one for images.
    """
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        if (family := FAMILIES.get(type(module))) is not None and path:
            holder = modules[path.rpartition(".")[0]]
            found.append(FoundTower(path, cast(PreTrainedModel, module), holder, family))
    if not found:
        raise UserError(
            f"{where} has no vision tower that can be swapped: its vision model is "
            f"{_vision_class(modules)}.",
            f"The tower must be of class {' or '.join(kind.__name__ for kind in FAMILIES)}.",
        )
    if len(found) == 1:
        return found[0]
    return _tower_for_images(found, where)


def inspect_config(config: Mapping[str, object], where: str) -> TowerOutline:
    """Say where the tower of a configuration sits and how it is read.

    The model is built on the meta device, without weights and without memory for them.

    Args:
        config: Content of `config.json`.
        where: Name of the file, for messages.

    Raises:
        UserError: If transformers cannot build the model, or it has no tower that can be swapped.
    """
    return _inspect(json.dumps(config, sort_keys=True), where)


def model_class(config: Any, architectures: object, where: str) -> Any:
    """Return the class of transformers that a configuration is loaded with.

    Args:
        config: The configuration.
        architectures: What `config.json` names; the first one that transformers has is taken. Only
            where it names none, the usual one of its `model_type` is.
        where: Name of the file, for messages.

    Raises:
        UserError: If transformers has no class for it, or the class is another model's.
    """
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    usual = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type, "")
    for name in names or [usual]:
        found = getattr(transformers, name, None) if name else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            # Classes of kindred models can often be built from each other's configurations.
            if not isinstance(config, cast(Any, found).config_class):
                raise UserError(
                    f"{where} names the model class {name}, which is not of its model_type "
                    f"{config.model_type!r}.",
                    "Restore config.json from the base model.",
                )
            return found
    mapping: Any = transformers.MODEL_MAPPING
    if not names and type(config) in mapping:
        return mapping[type(config)]
    # Its own code may read the tower in another way than the class of that model_type.
    raise UserError(
        f"{where} names the model classes {', '.join(names) or 'none'}, which transformers "
        f"{transformers.__version__} does not have.",
        _OWN_CODE,
    )


def conversing_class(model_dir: Path) -> tuple[Any, Any]:
    """Return the class that a directory is loaded with, and its configuration.

    Raises:
        UserError: If it is not one that continues a conversation.
    """
    raw = read_model_config(model_dir)
    where = str(Path(model_dir) / "config.json")
    config = read_config(raw, where)
    loader = model_class(config, raw.get("architectures"), where)
    # Encoder-decoder models take their question in another way, which is not tried here.
    if not issubclass(loader, GenerationMixin) or config.is_encoder_decoder:
        raise UserError(
            f"{model_dir} is a {loader.__name__}, which does not continue a conversation.",
            "Its tower can be swapped and verified; answers need an adapter of its own.",
        )
    return loader, config


def read_config(raw: Mapping[str, object], where: str) -> Any:
    """Make the configuration object of transformers, defaults filled in, no remote code.

    Raises:
        UserError: If transformers does not know the model type or refuses the content.
    """
    mapping: Any = transformers.CONFIG_MAPPING
    model_type = raw.get("model_type")
    if model_type not in mapping:
        raise UserError(
            f"{where} is of model_type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know.",
            f"{_OWN_CODE} A newer transformers may have it.",
        )
    try:
        return mapping[model_type].from_dict(dict(raw))
    # transformers validates with exception types of its own.
    except Exception as error:
        raise UserError(
            f"{where} is not a valid {model_type} configuration: {_reason(error)}."
        ) from error


@functools.lru_cache(maxsize=8)
def _inspect(content: str, where: str) -> TowerOutline:
    raw = json.loads(content)
    config = read_config(raw, where)
    kind = model_class(config, raw.get("architectures"), where)
    try:
        with torch.device("meta"), no_init_weights():
            model = kind(config)
    # Any model's constructor runs here.
    except Exception as error:
        raise UserError(
            f"transformers cannot build the {kind.__name__} of {where}: {_reason(error)}.",
            "Restore config.json from the base model.",
        ) from error
    found = find_tower(model, where)
    vision_config: dict[str, Any] = found.module.config.to_dict()
    reader = _reader_of(found.holder)
    if reader is None:
        return TowerOutline(found.path, found.family, vision_config, None, None)
    holder_config = cast(PreTrainedModel, found.holder).config
    return TowerOutline(
        path=found.path,
        family=found.family,
        vision_config=vision_config,
        tap=reader.tap(holder_config, found.family),
        projector=reader.projector(holder_config),
    )


def _tower_for_images(found: list[FoundTower], where: str) -> FoundTower:
    chosen = []
    for tower in found:
        reader = _reader_of(tower.holder)
        if reader is not None and tower.path.rpartition(".")[2] == reader.attribute:
            chosen.append(tower)
    paths = [tower.path for tower in found]
    if len(chosen) != 1:
        raise UserError(
            f"{where} has several vision towers ({', '.join(paths)}), and it is not known which "
            "one is for images.",
            "It needs an adapter of its own.",
        )
    others = ", ".join(path for path in paths if path != chosen[0].path)
    LOGGER.info(
        "%s has several towers; %s is taken, which %s uses for images (%s stays as it is)",
        where,
        chosen[0].path,
        type(chosen[0].holder).__name__,
        others,
    )
    return chosen[0]


def _reader_of(holder: nn.Module) -> Reader | None:
    # A class of that name from elsewhere may read its tower differently.
    is_known = type(holder).__module__.startswith("transformers.")
    return READERS.get(type(holder).__name__) if is_known else None


def _vision_class(modules: Mapping[str, nn.Module]) -> str:
    for module in modules.values():
        if getattr(module, "input_modalities", None) == ("image",):
            return f"a {type(module).__name__}"
    return "none that transformers declares as one"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].rstrip('.') if lines else 'no reason given'}"
