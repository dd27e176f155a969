"""Recognises LLaVA-1.5 directories and says where their vision tower sits (no torch at import)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.base import Tap, TowerSlot
from kuea_mllm.adapters.lazy import LazyAdapter, RuntimeClass, TunerModule
from kuea_mllm.adapters.llava.original import check_original, is_original, original_slot
from kuea_mllm.adapters.llava.reading import find_reading_problems
from kuea_mllm.adapters.projector import ProjectorInput, projector_width
from kuea_mllm.adapters.reading import ReadingProblem
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import channel_values, check_complete, image_settings

# transformers' name of the tower's configuration -> our family.
_FAMILIES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
_CLASSES = {"LlavaForConditionalGeneration", "LlavaModel"}
_PROJECTOR = "multi_modal_projector.linear_1.weight"


class LlavaAdapter(LazyAdapter):
    """LLaVA-1.5 in Hugging Face form, and its authors' layout as far as a swap needs it."""

    name = "llava"
    model_name = "LlavaForConditionalGeneration"

    def recognises(self, config: Mapping[str, object]) -> bool:
        """Say whether this is a LLaVA configuration, original layout included."""
        return config.get("model_type") == "llava" or is_original(config)

    def check_base(self, base: Path) -> None:
        """Make sure that a LLaVA directory is complete, in either layout.

        Raises:
            UserError: Naming the missing file.
        """
        if is_original(read_model_config(base)):
            check_original(base)
            return
        _read_config(base)
        check_complete(base)

    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the tower of a LLaVA directory, defaults filled in as transformers does.

        Raises:
            UserError: If the tower is neither CLIP nor SigLIP.
        """
        if is_original(read_model_config(base)):
            return original_slot(base)
        config = resolve_config(base)
        vision = config.vision_config.to_dict()
        family = _FAMILIES.get(str(vision.get("model_type")))
        if family is None:
            raise UserError(
                f"{base / 'config.json'} asks for a {vision.get('model_type')!r} vision tower.",
                f"Only these can be swapped: {', '.join(_FAMILIES)}.",
            )
        chosen = config.vision_feature_layer
        layers = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        settings = image_settings(base)
        return TowerSlot(
            vision_config=vision,
            module="model.vision_tower",
            tap=Tap(layers, drops_cls=config.vision_feature_select_strategy == "default"),
            family=family,
            mean=channel_values(settings, "image_mean", base),
            std=channel_values(settings, "image_std", base),
            projector_width=projector_width(base, ProjectorInput(_PROJECTOR, 1, len(layers))),
        )

    def reading_problems(self, base: Path) -> list[ReadingProblem]:
        """Compare the settings of a directory with those that LLaVA-1.5 was trained with."""
        return find_reading_problems(base)

    def import_released(
        self, source: Path, destination: Path, *, tower: str | None, command: str | None
    ) -> None:
        """Write the Hugging Face form of a LLaVA-1.5 in its authors' layout.

        Raises:
            UserError: If the source is incomplete or of another layout, or `destination` exists.
        """
        from kuea_mllm.adapters.llava.import_original import import_original

        import_original(source, destination, vision_tower=tower, command=command)

    def _check_loadable(self, base: Path) -> None:
        # `check_base` also takes the authors' layout, which transformers would misread.
        _read_config(base)
        super()._check_loadable(base)

    def _model_class(self, base: Path) -> tuple[Any, Any]:
        return model_class(base)

    def _runtime(self) -> RuntimeClass:
        from kuea_mllm.adapters.llava.runtime import LlavaRuntime

        return LlavaRuntime

    def _tuner(self) -> TunerModule:
        from kuea_mllm.adapters.llava import tuner

        return tuner

    def import_lora(self, source: Path, destination: Path, *, command: str | None) -> None:
        """Write LoRA weights in the authors' layout as a PEFT directory.

        Raises:
            UserError: If the source is incomplete or of another layout, or `destination` exists.
        """
        from kuea_mllm.adapters.llava.original_lora import import_lora

        import_lora(source, destination, command=command)

    def export_lora(self, source: Path, destination: Path, *, tower: str | None) -> None:
        """Write LoRA weights as the authors' code saves them.

        Raises:
            UserError: If the layout has no place for something, or `destination` exists.
        """
        from kuea_mllm.adapters.llava.original_lora import export_lora

        export_lora(source, destination, tower=tower)


def model_class(model_dir: Path) -> tuple[Any, Any]:
    """Return the model class of a directory, and its configuration.

    Raises:
        UserError: If the configuration is not LLaVA in Hugging Face layout.
    """
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration, resolve_config(model_dir)


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
    if is_original(config):
        raise UserError(
            f"{model_dir} is LLaVA in its original layout (model_type "
            f"{config.get('model_type')!r}, mm_vision_tower {config.get('mm_vision_tower')!r}), "
            "which is not run here.",
            "Make the Hugging Face form of it: kuea-mllm convert SOURCE NEW --mllm llava.",
        )
    if config.get("model_type") != "llava":
        raise UserError(
            f"{model_dir} is not LLaVA-1.5: config.json says model_type "
            f"{config.get('model_type')!r}, expected 'llava'."
        )
    named = config.get("architectures")
    if isinstance(named, list) and named and not set(named) & _CLASSES:
        raise UserError(
            f"{model_dir / 'config.json'} names the model class {named[0]}, which may read its "
            "tower in another way than LLaVA-1.5.",
            "Models that bring their own code (auto_map, trust_remote_code) cannot be used.",
        )
    return config
