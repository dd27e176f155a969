"""Recognises OpenFlamingo directories and says where their tower sits (no torch at import)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.base import Tap, TowerSlot
from kuea_mllm.adapters.lazy import LazyAdapter, RuntimeClass, TunerModule
from kuea_mllm.adapters.projector import ProjectorInput, projector_width
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import channel_values, check_complete, image_settings

MODEL_TYPE = "openflamingo"
TOWER_MODULE = "model.vision_tower"
# The norm over the patch tokens is as wide as the tower.
_PROJECTOR = ProjectorInput("resampler.layers.0.attention.norm_media.weight", 0)

# Where the three parts of a release are expected in one directory.
CHECKPOINTS = ("checkpoint.pt", "checkpoint.safetensors")
LANGUAGE_MODEL = "language_model"
TOWER = "vision_tower"


class OpenFlamingoAdapter(LazyAdapter):
    """OpenFlamingo-3B in the Hugging Face form of this package."""

    name = "openflamingo"
    model_name = "OpenFlamingoForConditionalGeneration"

    def recognises(self, config: Mapping[str, object]) -> bool:
        """Say whether this is an OpenFlamingo configuration."""
        return config.get("model_type") == MODEL_TYPE

    def check_base(self, base: Path) -> None:
        """Make sure that a directory is complete.

        Raises:
            UserError: Naming what is missing.
        """
        resolve_config(base)
        check_complete(base)

    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the tower: its last block is read before the final norm, patches alone.

        Raises:
            UserError: If the configuration is not valid.
        """
        settings = image_settings(base)
        return TowerSlot(
            vision_config=resolve_config(base).vision_config.to_dict(),
            module=TOWER_MODULE,
            tap=Tap((-1,), drops_cls=True, after_norm=False),
            family="clip",
            mean=channel_values(settings, "image_mean", base),
            std=channel_values(settings, "image_std", base),
            projector_width=projector_width(base, _PROJECTOR),
        )

    def import_released(
        self, source: Path, destination: Path, *, tower: str | None, command: str | None
    ) -> None:
        """Write the Hugging Face form of a released OpenFlamingo.

        Args:
            source: Directory with `checkpoint.pt` and, below `language_model/`, the language model
                of the release; a tower below `vision_tower/` is taken where `tower` names none.
            destination: Directory to create.
            tower: The CLIP tower; None takes `vision_tower/`, else OpenAI's ViT-L/14.
            command: Command line to record.

        Raises:
            UserError: If a part is missing or does not fit the others, or `destination` exists.
        """
        self.import_parts(
            source,
            destination,
            language_model=None,
            tokenizer=None,
            tower=tower,
            activation=None,
            heads=None,
            command=command,
        )

    def import_parts(
        self,
        source: Path,
        destination: Path,
        *,
        language_model: Path | None,
        tokenizer: Path | None,
        tower: str | None,
        activation: str | None,
        heads: int | None,
        command: str | None,
        accept: Collection[str] = (),
    ) -> None:
        """Write the Hugging Face form of a released OpenFlamingo whose parts may lie apart.

        Args:
            source: `checkpoint.pt`, or a directory as for `import_released`.
            destination: Directory to create.
            language_model: Directory of MPT-1B; None takes `language_model/` beside the checkpoint.
            tokenizer: Directory of GPT-NeoX-20B's tokenizer; None takes the language model's.
            tower: The CLIP tower; None takes `vision_tower/`, else OpenAI's ViT-L/14.
            activation: The tower's, where its files do not state it.
            heads: Likewise.
            command: Command line to record.
            accept: What may differ from the release: "embedding" and "tower", see
                `convert.import_released`.

        Raises:
            UserError: If a part is missing or does not fit the others, or `destination` exists.
        """
        from kuea_mllm.adapters.openflamingo.convert import RELEASED_TOWER, import_released

        checkpoint, beside = _find_checkpoint(Path(source))
        if language_model is None:
            language_model = beside / LANGUAGE_MODEL
        if not language_model.is_dir():
            raise UserError(
                f"there is no language model {language_model}.",
                "Give its directory with --language-model: for OpenFlamingo-3B a download of "
                "anas-awadalla/mpt-1b-redpajama-200b (Instruct: -dolly).",
            )
        own_tower = beside / TOWER
        import_released(
            checkpoint,
            language_model,
            destination,
            tower=tower or (own_tower if own_tower.is_dir() else RELEASED_TOWER),
            tokenizer=tokenizer,
            activation=activation,
            heads=heads,
            accept=accept,
            command=command,
        )

    def export_released(self, source: Path, destination: Path) -> None:
        """Write `checkpoint.pt`, `language_model/` and `vision_tower/` of a model directory.

        Raises:
            UserError: If `source` is not complete, or `destination` exists.
        """
        self.check_base(source)
        from kuea_mllm.adapters.openflamingo.export import export_released

        export_released(source, destination)

    def _model_class(self, base: Path) -> tuple[Any, Any]:
        from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration

        return OpenFlamingoForConditionalGeneration, resolve_config(base)

    def _runtime(self) -> RuntimeClass:
        from kuea_mllm.adapters.openflamingo.runtime import OpenFlamingoRuntime

        return OpenFlamingoRuntime

    def _tuner(self) -> TunerModule:
        from kuea_mllm.adapters.openflamingo import tuner

        return tuner


def resolve_config(model_dir: Path) -> Any:
    """Return the `OpenFlamingoConfig` of a directory, defaults filled in.

    Raises:
        UserError: If the configuration is not an OpenFlamingo's.
    """
    config = read_model_config(model_dir)
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{model_dir} is not OpenFlamingo in Hugging Face form: config.json says model_type "
            f"{config.get('model_type')!r}, expected {MODEL_TYPE!r}.",
            "Convert the released files: kuea-mllm convert SOURCE NEW --mllm openflamingo.",
        )
    from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig

    try:
        return OpenFlamingoConfig.from_dict(dict(config))
    except UserError:
        raise
    # transformers validates with exception types of its own.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"file {model_dir / 'config.json'} is not a valid OpenFlamingo configuration: "
            f"{reason[-1]}."
        ) from error


def _find_checkpoint(source: Path) -> tuple[Path, Path]:
    """Return the checkpoint, and the directory in which its other parts may lie."""
    if not source.is_dir():
        return source, source.parent
    found = [source / name for name in CHECKPOINTS if (source / name).is_file()]
    if len(found) != 1:
        raise UserError(
            f"{source} is not laid out as expected: it needs one of {' or '.join(CHECKPOINTS)}, "
            f"and the language model in {LANGUAGE_MODEL}/.",
            "Or give the checkpoint itself, with --language-model.",
        )
    return found[0], source
