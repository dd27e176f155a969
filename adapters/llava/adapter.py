"""Recognises LLaVA-1.5 directories and says where their vision tower sits (no torch at import)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import MLLMRuntime, TowerSlot
from kuea_mllm.adapters.checkpoint import channel_values, check_complete, image_settings
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# transformers' name of the tower's configuration -> our family.
_FAMILIES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}

# Releases differ twice: with or without "model." in front (a state dict against a saved file), with
# or without the "vision_model." level that transformers 5 dropped. Longest match first.
_KEY_PREFIXES = (
    "model.vision_tower.vision_model.",
    "vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.",
)


class LlavaAdapter:
    """LLaVA-1.5 in Hugging Face form (`LlavaForConditionalGeneration`)."""

    name = "llava"

    def recognises(self, config: Mapping[str, object]) -> bool:
        """Say whether this is a LLaVA configuration, original layout included."""
        return config.get("model_type") == "llava" or _is_original_layout(config)

    def check_base(self, base: Path) -> None:
        """Make sure that a LLaVA directory is complete and in Hugging Face layout.

        Raises:
            UserError: Naming the missing file or the layout.
        """
        _read_config(base)
        check_complete(base)

    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the tower of a LLaVA directory, defaults filled in as transformers does.

        Raises:
            UserError: If the tower is neither CLIP nor SigLIP, or several layers are read.
        """
        config = resolve_config(base)
        vision = config.vision_config.to_dict()
        family = _FAMILIES.get(str(vision.get("model_type")))
        if family is None:
            raise UserError(
                f"{base / 'config.json'} asks for a {vision.get('model_type')!r} vision tower.",
                f"Only these can be swapped: {', '.join(_FAMILIES)}.",
            )
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise UserError(
                f"{base / 'config.json'} reads several layers (vision_feature_layer {layer}); "
                "LLaVA-1.5 reads one."
            )
        settings = image_settings(base)
        return TowerSlot(
            vision_config=vision,
            key_prefixes=_KEY_PREFIXES,
            tap_layer=layer,
            drops_cls=config.vision_feature_select_strategy == "default",
            family=family,
            mean=channel_values(settings, "image_mean", base),
            std=channel_values(settings, "image_std", base),
        )

    def vision_module(self, model: nn.Module) -> nn.Module:
        """Return the vision tower of a loaded `LlavaForConditionalGeneration` or `LlavaModel`.

        Raises:
            UserError: If the model has no such part.
        """
        inner = getattr(model, "model", model)
        tower: nn.Module | None = getattr(inner, "vision_tower", None)
        if tower is None:
            raise UserError(
                f"a {type(model).__name__} has no vision_tower; "
                "the llava adapter expects LlavaForConditionalGeneration."
            )
        return tower

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        """Load a LLaVA directory for answering questions.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        self.check_base(model_dir)
        # Checked before the slow part: the same refusals as for a swap.
        self.tower_slot(model_dir)
        from kuea_mllm.adapters.llava.runtime import LlavaRuntime

        return LlavaRuntime.load(model_dir, dtype=dtype, device=device)


def resolve_config(model_dir: Path) -> Any:
    """Return the `LlavaConfig` of a directory, defaults filled in.

    Raises:
        UserError: If the configuration is not LLaVA in Hugging Face layout.
    """
    raw = _read_config(model_dir)
    from transformers import LlavaConfig

    try:
        return LlavaConfig.from_dict(dict(raw))
    # transformers validates with exception types of its own.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"file {model_dir / 'config.json'} is not a valid LLaVA configuration: {reason[-1]}."
        ) from error


def _read_config(model_dir: Path) -> Mapping[str, object]:
    config = read_model_config(model_dir)
    if _is_original_layout(config):
        raise UserError(
            f"{model_dir} is LLaVA in its original layout (model_type "
            f"{config.get('model_type')!r}, mm_vision_tower {config.get('mm_vision_tower')!r}), "
            "which is not supported.",
            "Use the Hugging Face form, e.g. llava-hf/llava-1.5-7b-hf, or convert it with "
            "transformers' models/llava/convert_llava_weights_to_hf.py.",
        )
    if config.get("model_type") != "llava":
        raise UserError(
            f"{model_dir} is not LLaVA-1.5: config.json says model_type "
            f"{config.get('model_type')!r}, expected 'llava'."
        )
    return config


def _is_original_layout(config: Mapping[str, object]) -> bool:
    # The original code writes model_type "llava_llama", older releases "llava" with its own fields;
    # transformers would load the latter with random weights (fact sheet, trap 11).
    return config.get("model_type") == "llava_llama" or (
        config.get("model_type") == "llava" and "mm_vision_tower" in config
    )
