"""Finds the tower of any Hugging Face VLM from its configuration (no torch at import)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.adapters.lazy import LazyAdapter, RuntimeClass, TunerModule
from kuea_mllm.adapters.projector import projector_width
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import channel_values, check_complete, image_settings

if TYPE_CHECKING:
    from torch import nn

    from kuea_mllm.adapters.hf_vlm.structure import TowerOutline

# Written by the original LLaVA code; transformers would read such a file with its own defaults.
_ORIGINAL_LAYOUT = "mm_vision_tower"


class HFVLMAdapter(LazyAdapter):
    """Hugging Face VLMs with a `CLIPVisionModel` or `SiglipVisionModel` inside."""

    name = "hf_vlm"

    def recognises(self, config: Mapping[str, object]) -> bool:
        """Say whether this is the configuration of a VLM that transformers itself can build.

        VLMs with another kind of tower are recognised too: `check_base` then names its class.
        """
        if _ORIGINAL_LAYOUT in config:
            return False
        return any(_is_vlm(model_type) for model_type in _model_types(config))

    def check_base(self, base: Path) -> None:
        """Make sure that a directory is complete and holds a tower of a family we know.

        Raises:
            UserError: Naming the missing file, or the class of the vision model.
        """
        inspect_base(base)
        check_complete(base)

    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the tower of a VLM directory, as transformers builds it from `config.json`.

        Raises:
            UserError: If the configuration is none of a VLM with a CLIP or SigLIP tower.
        """
        found = inspect_base(base)
        settings = image_settings(base)
        width = None
        if found.projector is not None:
            width = projector_width(base, found.projector)
        return TowerSlot(
            vision_config=found.vision_config,
            module=found.path,
            tap=found.tap,
            family=found.family,
            mean=channel_values(settings, "image_mean", base),
            std=channel_values(settings, "image_std", base),
            projector_width=width,
        )

    def vision_module(self, model: nn.Module) -> nn.Module:
        """Return the vision tower of a loaded VLM, found by its class.

        Raises:
            UserError: If the model holds no tower of a family we know, or several.
        """
        from kuea_mllm.adapters.hf_vlm.structure import find_tower

        return find_tower(model, f"a loaded {type(model).__name__}").module

    def _check_loadable(self, base: Path) -> None:
        self.check_base(base)

    def _model_class(self, base: Path) -> tuple[Any, Any]:
        inspect_base(base)
        from kuea_mllm.adapters.hf_vlm.structure import conversing_class

        return conversing_class(base)

    def _runtime(self) -> RuntimeClass:
        from kuea_mllm.adapters.hf_vlm.runtime import HFVLMRuntime

        return HFVLMRuntime

    def _tuner(self) -> TunerModule:
        from kuea_mllm.adapters.hf_vlm import tuner

        return tuner

    def load_for_tuning(
        self, base: Path, *, dtype: str, device: str, quantization: object | None = None
    ) -> nn.Module:
        """Load a VLM directory to be tuned.

        Raises:
            UserError: If the directory, the dtype or the device is not usable, or the model does
                more to its logits than its output layer.
        """
        model = super().load_for_tuning(base, dtype=dtype, device=device, quantization=quantization)
        from kuea_mllm.adapters.hf_vlm.tuner import keep_to_parts

        return keep_to_parts(model, base, is_quantised=quantization is not None)


def inspect_base(base: Path) -> TowerOutline:
    """Say where the tower of a VLM directory sits, and how it is read.

    Raises:
        UserError: If the configuration is none of a VLM with a CLIP or SigLIP tower.
    """
    config = read_model_config(base)
    where = str(Path(base) / "config.json")
    if _ORIGINAL_LAYOUT in config:
        raise UserError(
            f"{where} is LLaVA's in its original layout ({_ORIGINAL_LAYOUT} "
            f"{config[_ORIGINAL_LAYOUT]!r}), which transformers would misread.",
            "Use --mllm llava.",
        )
    from kuea_mllm.adapters.hf_vlm.structure import inspect_config

    return inspect_config(config, where)


def _model_types(config: Mapping[str, object]) -> list[str]:
    """Collect the `model_type` of a configuration and of all configurations inside of it."""
    found = [str(config["model_type"])] if isinstance(config.get("model_type"), str) else []
    for value in config.values():
        if isinstance(value, Mapping):
            found.extend(_model_types(value))
    return found


def _is_vlm(model_type: str) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    from kuea_mllm.adapters.hf_vlm.readers import READERS

    return (
        model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        or MODEL_MAPPING_NAMES.get(model_type) in READERS
    )
