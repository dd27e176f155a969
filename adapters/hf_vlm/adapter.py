"""Finds the tower of any Hugging Face VLM from its configuration (no torch at import)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import MLLMRuntime, TowerSlot, TuningFormat, TuningParts
from kuea_mllm.adapters.projector import projector_width
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import channel_values, check_complete, image_settings

if TYPE_CHECKING:
    from torch import Tensor, nn

# Written by the original LLaVA code; transformers would read such a file with its own defaults.
_ORIGINAL_LAYOUT = "mm_vision_tower"


class HFVLMAdapter:
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
        self._inspect(base)
        check_complete(base)

    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the tower of a VLM directory, as transformers builds it from `config.json`.

        Raises:
            UserError: If the configuration is none of a VLM with a CLIP or SigLIP tower.
        """
        found = self._inspect(base)
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

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        """Load a VLM directory for answering questions with its own chat template.

        Raises:
            UserError: If the directory, the dtype or the device is not usable, or the model has no
                chat template.
        """
        self.check_base(model_dir)
        from kuea_mllm.adapters.hf_vlm.runtime import HFVLMRuntime

        return HFVLMRuntime.load(model_dir, dtype=dtype, device=device)

    def tuning_parts(self, base: Path) -> TuningParts:
        """Return where the parts of a VLM are, as transformers builds it.

        Raises:
            UserError: If they do not lie beside each other.
        """
        self._inspect(base)
        from kuea_mllm.adapters.hf_vlm import tuner

        return tuner.tuning_parts(base)

    def tuning_format(self, base: Path, *, max_length: int) -> TuningFormat:
        """Return how samples are read, by the model's own chat template and processor.

        Raises:
            UserError: If there is no chat template or it does not show what is an answer, or if
                images take a varying number of tokens.
        """
        self._inspect(base)
        from kuea_mllm.adapters.hf_vlm import tuner

        return tuner.tuning_format(base, max_length=max_length)

    def build_empty(self, base: Path) -> nn.Module:
        """Return the model of a directory on the meta device."""
        self._inspect(base)
        from kuea_mllm.adapters.hf_vlm import tuner

        return tuner.build_empty(base)

    def load_for_tuning(
        self, base: Path, *, dtype: str, device: str, quantization: object | None = None
    ) -> nn.Module:
        """Load a VLM directory to be tuned.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        self.check_base(base)
        from kuea_mllm.adapters.hf_vlm import tuner

        return tuner.load_for_tuning(base, dtype=dtype, device=device, quantization=quantization)

    def hidden_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the output layer reads, (rows, tokens, width)."""
        from kuea_mllm.adapters.hf_vlm import tuner

        return tuner.hidden_states(model, batch)

    def image_features(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Return what the language model gets of images, (images, tokens, width)."""
        from kuea_mllm.adapters.hf_vlm import tuner

        return tuner.image_features(model, pixel_values)

    def _inspect(self, base: Path) -> Any:
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
