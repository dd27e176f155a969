"""Recognises LLaVA-1.5 directories and says where their vision tower sits (no torch at import)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import MLLMRuntime, Tap, TowerSlot, TuningFormat, TuningParts
from kuea_mllm.adapters.llava.original import check_original, is_original, original_slot
from kuea_mllm.adapters.llava.reading import find_reading_problems
from kuea_mllm.adapters.projector import ProjectorInput, projector_width
from kuea_mllm.adapters.reading import ReadingProblem
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import channel_values, check_complete, image_settings

if TYPE_CHECKING:
    from torch import Tensor, nn

# transformers' name of the tower's configuration -> our family.
_FAMILIES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
_CLASSES = {"LlavaForConditionalGeneration", "LlavaModel"}
_PROJECTOR = "multi_modal_projector.linear_1.weight"


class LlavaAdapter:
    """LLaVA-1.5 in Hugging Face form, and its authors' layout as far as a swap needs it."""

    name = "llava"

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

    def import_released(
        self, source: Path, destination: Path, *, tower: str | None, command: str | None
    ) -> None:
        """Write the Hugging Face form of a LLaVA-1.5 in its authors' layout.

        Raises:
            UserError: If the source is incomplete or of another layout, or `destination` exists.
        """
        from kuea_mllm.adapters.llava.import_original import import_original

        import_original(source, destination, vision_tower=tower, command=command)

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        """Load a LLaVA directory for answering questions.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        _read_config(model_dir)
        self.check_base(model_dir)
        # Checked before the slow part: the same refusals as for a swap.
        self.tower_slot(model_dir)
        from kuea_mllm.adapters.llava.runtime import LlavaRuntime

        return LlavaRuntime.load(model_dir, dtype=dtype, device=device)

    def tuning_parts(self, base: Path) -> TuningParts:
        """Return where the parts are that tuning trains or leaves alone.

        Raises:
            UserError: If configuration and tokenizer do not say which rows stand for tokens.
        """
        from kuea_mllm.adapters.llava import tuner

        return tuner.tuning_parts(base)

    def tuning_format(self, base: Path, *, max_length: int) -> TuningFormat:
        """Return LLaVA-1.5's conversation format and image preprocessing.

        Raises:
            UserError: If tokenizer or processor are missing or follow another format.
        """
        from kuea_mllm.adapters.llava import tuner

        return tuner.tuning_format(base, max_length=max_length)

    def build_empty(self, base: Path) -> nn.Module:
        """Return the `LlavaForConditionalGeneration` of a directory on the meta device."""
        from kuea_mllm.adapters.llava import tuner

        return tuner.build_empty(base)

    def load_for_tuning(
        self, base: Path, *, dtype: str, device: str, quantization: object | None = None
    ) -> nn.Module:
        """Load a LLaVA directory to be tuned.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        # `check_base` also takes the authors' layout, which transformers would misread.
        _read_config(base)
        self.check_base(base)
        self.tower_slot(base)
        from kuea_mllm.adapters.llava import tuner

        return tuner.load_for_tuning(base, dtype=dtype, device=device, quantization=quantization)

    def hidden_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the output layer reads, (rows, tokens, width)."""
        from kuea_mllm.adapters.llava import tuner

        return tuner.hidden_states(model, batch)

    def image_features(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Return what the language model gets of images, (images, tokens, width)."""
        from kuea_mllm.adapters.llava import tuner

        return tuner.image_features(model, pixel_values)

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
