"""Recognises directories of LLaVA with mixed image tokens (no torch at import)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import Tap, TowerSlot
from kuea_mllm.adapters.lazy import LazyAdapter, RuntimeClass, TunerModule
from kuea_mllm.adapters.projector import ProjectorInput, projector_width
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import channel_values, check_complete, image_settings

if TYPE_CHECKING:
    from torch import nn

_MODEL_TYPE = "llava_mof"
_PROJECTOR = "multi_modal_projector.linear_1.weight"


class LlavaMofAdapter(LazyAdapter):
    """LLaVA-1.5 that reads CLIP and DINOv2 tokens mixed before its projector."""

    name = "llava_mof"
    model_name = "LlavaMofForConditionalGeneration"

    def recognises(self, config: Mapping[str, object]) -> bool:
        """Say whether this is a configuration that `build` wrote."""
        return config.get("model_type") == _MODEL_TYPE

    def check_base(self, base: Path) -> None:
        """Make sure that a directory is complete.

        Raises:
            UserError: Naming the missing file.
        """
        _read_config(base)
        check_complete(base)

    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the CLIP tower; the second encoder is no tower that could be swapped.

        Raises:
            UserError: If the configuration describes no CLIP tower.
        """
        config = resolve_config(base)
        vision = config.vision_config.to_dict()
        if vision.get("model_type") != "clip_vision_model":
            raise UserError(
                f"{base / 'config.json'} asks for a {vision.get('model_type')!r} vision tower; "
                "tokens are mixed with those of a CLIP tower."
            )
        settings = image_settings(base)
        return TowerSlot(
            vision_config=vision,
            module="model.vision_tower",
            tap=Tap(
                (config.vision_feature_layer,),
                drops_cls=config.vision_feature_select_strategy == "default",
            ),
            family="clip",
            mean=channel_values(settings, "image_mean", base),
            std=channel_values(settings, "image_std", base),
            projector_width=projector_width(base, ProjectorInput(_PROJECTOR, 1)),
        )

    def vision_module(self, model: nn.Module) -> nn.Module:
        """Return the CLIP tower of a loaded model.

        Raises:
            UserError: If the model has no such part.
        """
        tower = super().vision_module(model)
        if not hasattr(getattr(model, "model", model), "expert_tower"):
            raise UserError(
                f"a {type(model).__name__} has no expert_tower; "
                f"the {self.name} adapter expects {self.model_name}."
            )
        return tower

    def import_released(
        self, source: Path, destination: Path, *, tower: str | None, command: str | None
    ) -> None:
        """Make a mixed model of a LLaVA-1.5 in Hugging Face form and a DINOv2.

        Args:
            source: The LLaVA-1.5 directory.
            destination: Directory to create.
            tower: The DINOv2 whose tokens are mixed in.
            command: Command line to record.

        Raises:
            UserError: If an input is incomplete or of another kind, or `destination` exists.
        """
        from kuea_mllm.adapters.llava_mof.build import build_mixture

        build_mixture(source, destination, expert=tower, command=command)

    def _model_class(self, base: Path) -> tuple[Any, Any]:
        return model_class(base)

    def _runtime(self) -> RuntimeClass:
        from kuea_mllm.adapters.llava_mof.runtime import LlavaMofRuntime

        return LlavaMofRuntime

    def _tuner(self) -> TunerModule:
        from kuea_mllm.adapters.llava_mof import tuner

        return tuner


def model_class(model_dir: Path) -> tuple[Any, Any]:
    """Return the model class of a directory, and its configuration.

    Raises:
        UserError: If the configuration is not of this kind, or not valid.
    """
    config = resolve_config(model_dir)
    from kuea_mllm.adapters.llava_mof.modeling import LlavaMofForConditionalGeneration

    return LlavaMofForConditionalGeneration, config


def resolve_config(model_dir: Path) -> Any:
    """Return the `LlavaMofConfig` of a directory, defaults filled in.

    Raises:
        UserError: If the configuration is not of this kind, or not valid.
    """
    raw = _read_config(model_dir)
    from kuea_mllm.adapters.llava_mof.configuration import LlavaMofConfig
    from kuea_mllm.adapters.llava_mof.registration import register

    register()
    try:
        return LlavaMofConfig.from_dict(dict(raw))
    except UserError as error:
        raise UserError(
            f"file {model_dir / 'config.json'}: {error.problem}", error.remedy
        ) from error
    # transformers validates with exception types of its own.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"file {model_dir / 'config.json'} is not a valid configuration of a mixed LLaVA: "
            f"{reason[-1]}."
        ) from error


def _read_config(model_dir: Path) -> Mapping[str, object]:
    config = read_model_config(model_dir)
    if config.get("model_type") != _MODEL_TYPE:
        raise UserError(
            f"{model_dir} is no LLaVA with mixed tokens: config.json says model_type "
            f"{config.get('model_type')!r}, expected {_MODEL_TYPE!r}.",
            "Make one: kuea-mllm convert LLAVA NEW --mllm llava_mof --tower DINOV2.",
        )
    return config
