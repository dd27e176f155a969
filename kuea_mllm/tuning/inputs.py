"""Everything a tuning reads, opened and checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuea_mllm.adapters.base import MLLMAdapter, MLLMTuner, TuningFormat, TuningParts
from kuea_mllm.adapters.registry import adapter_for, get_adapter
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.devices import choose_device
from kuea_mllm.errors import DataError, RecipeError, UserError
from kuea_mllm.log import LOGGER
from kuea_mllm.training.distributed import rank, world_size
from kuea_mllm.tuning.base_identity import identify_base
from kuea_mllm.tuning.collate import Collator
from kuea_mllm.tuning.examples import TuningExamples, image_path
from kuea_mllm.tuning.mixture import Mixture, open_mixture
from kuea_mllm.tuning.packing import PackedCollator, PackedExamples
from kuea_mllm.tuning.token_counts import encoder_identity, open_token_counts

_FIRST_IMAGES = 64


@dataclass(frozen=True)
class TuningInputs:
    """What a run reads.

    Attributes:
        recipe: With everything settled.
        base: Directory of the model to be tuned.
        adapter: The adapter that knows it.
        tuner: The same, as what tunes.
        parts: Where the parts of the model are.
        format: How it reads samples.
        mixture: The records.
        images: Folder of their images.
        identity: What the base is recognised by.
        token_counts: Of every sample, where samples are packed.
    """

    recipe: LoraRecipe
    base: Path
    adapter: MLLMAdapter
    tuner: MLLMTuner
    parts: TuningParts
    format: TuningFormat
    mixture: Mixture
    images: Path | None
    identity: dict[str, Any]
    token_counts: NDArray[np.int32] | None = None

    @property
    def examples(self) -> TuningExamples | PackedExamples:
        """The samples by position, or by the positions of a row."""
        examples = TuningExamples(
            self.mixture,
            self.format.encoder,
            images=self.images,
            preprocess=self.format.preprocess,
            skipped=self.recipe.data.skip_records,
        )
        return PackedExamples(examples) if self.recipe.data.packing else examples

    @property
    def collator(self) -> Collator:
        """What makes batches of samples, or of rows of them."""
        data, format_ = self.recipe.data, self.format
        trains_projector = self.recipe.lora.projector == "train" and bool(self.parts.projector)
        return (PackedCollator if data.packing else Collator)(
            placeholder=format_.encoder.placeholder,
            image_token_id=format_.image_token_id,
            tokens_per_image=format_.tokens_per_image,
            pad_token_id=format_.encoder.pad_token_id,
            max_length=data.max_length,
            cut_after_splicing=bool(data.cut_after_splicing),
            idle_image_size=format_.image_size if trains_projector else None,
        )


def open_tuning_inputs(recipe: LoraRecipe, *, progress: bool = False) -> TuningInputs:
    """Open model directory, conversations and image folder, and settle the recipe.

    Args:
        recipe: As loaded.
        progress: Whether to show a bar where a mixture is read for the first time.

    Raises:
        UserError: If an input is missing, unreadable or of the wrong kind.
    """
    base = Path(_required(recipe.model.path, "model.path", "--model"))
    data = Path(_required(recipe.data.file, "data.file", "--data"))
    recipe = recipe.resolved(processes=world_size())
    if recipe.data.order == "released" and (recipe.optim.epochs or 1) > 1:
        raise RecipeError(
            "key 'data.order' is released, which is known of the first epoch only.",
            "Set data.order=seed, or optim.epochs=1.",
        )
    device = choose_device(recipe.runtime.device)
    recipe = recipe.model_copy(
        update={"runtime": recipe.runtime.model_copy(update={"device": device})}
    )
    _require_quantisable(recipe)
    adapter = _open_adapter(base, recipe.model.adapter)
    if not isinstance(adapter, MLLMTuner):
        raise UserError(
            f"models of the adapter {adapter.name!r} cannot be tuned here ({base}).",
            "Its package has to provide kuea_mllm.adapters.base.MLLMTuner.",
        )
    tuner: MLLMTuner = adapter
    parts = tuner.tuning_parts(base)
    format_ = tuner.tuning_format(base, max_length=recipe.data.max_length)
    mixture = open_mixture(data, progress=progress and rank() == 0)
    _require_records(recipe.data.skip_records, mixture)
    images = None if recipe.data.images is None else Path(recipe.data.images)
    if images is not None and not images.is_dir():
        raise DataError(f"image folder {images} does not exist.")
    inputs = TuningInputs(
        recipe=recipe,
        base=base,
        adapter=adapter,
        tuner=tuner,
        parts=parts,
        format=format_,
        mixture=mixture,
        images=images,
        identity=identify_base(base, adapter.tower_slot(base)),
    )
    _check_first_images(inputs)
    return _counted(inputs, progress=progress) if recipe.data.packing else inputs


def _counted(inputs: TuningInputs, *, progress: bool) -> TuningInputs:
    counts = open_token_counts(
        inputs.mixture,
        inputs.format.encoder,
        inputs.collator,
        identity=encoder_identity(inputs.base, inputs.adapter.name),
        workers=inputs.recipe.data.workers,
        progress=progress and rank() == 0,
    )
    return replace(inputs, token_counts=counts)


def _required(value: str | None, key: str, option: str) -> str:
    if value is None:
        raise UserError(f"key '{key}' is not set.", f"Give {option}, or set it in the recipe.")
    return value


def _open_adapter(base: Path, name: str | None) -> MLLMAdapter:
    if not base.is_dir():
        raise UserError(
            f"model directory {base} does not exist.",
            "Give the directory of an MLLM, as written by `kuea-mllm swap` or downloaded.",
        )
    for lora in (base, base / "adapter"):
        if (lora / "adapter_config.json").is_file() and not (base / "config.json").is_file():
            raise UserError(
                f"{base} holds LoRA weights, not a model.",
                f"Merge them first: `kuea-mllm merge {base} MERGED`, then --model MERGED.",
            )
    adapter = get_adapter(name) if name is not None else adapter_for(base)
    adapter.check_base(base)
    return adapter


def _require_quantisable(recipe: LoraRecipe) -> None:
    if recipe.model.quantization != "none" and recipe.lora.train_lm_head:
        raise RecipeError(
            "key 'lora.train_lm_head' is true with a quantised model.",
            "Set model.quantization=none, or leave the output layer frozen.",
        )


def _require_records(numbers: Sequence[int], mixture: Mixture) -> None:
    if numbers and max(numbers) >= len(mixture):
        raise RecipeError(
            f"key 'data.skip_records' names record {max(numbers)}, and the last one of "
            f"{mixture.source} is {len(mixture) - 1}.",
            "Give the numbers that messages call records by; the first is 0.",
        )


def _check_first_images(inputs: TuningInputs) -> None:
    """Look whether some images are there: a wrong --images shows before the model is loaded."""
    missing: list[str] = []
    looked_at = 0
    skipped = set(inputs.recipe.data.skip_records)
    for index in range(len(inputs.mixture)):
        if index in skipped:
            continue
        record = inputs.mixture.record(index)
        if record["image"] is None:
            continue
        if inputs.images is None:
            raise DataError(
                f"{inputs.mixture.name(index)} has an image, and no image folder is given.",
                "Pass --images DIR, the folder that the paths in the file are relative to.",
            )
        looked_at += 1
        if not image_path(inputs.images, record["image"]).is_file():
            missing.append(record["image"])
        if looked_at == _FIRST_IMAGES:
            break
    if not missing:
        return
    remedy = (
        f"All of them: `kuea-mllm doctor --data {inputs.mixture.source} --images {inputs.images}`."
    )
    problem = (
        f"{len(missing)} of the first {looked_at} images are missing from {inputs.images}, first "
        f"{missing[0]}."
    )
    if len(missing) == looked_at:
        raise DataError(problem, f"Are the paths relative to another folder? {remedy}")
    raise DataError(problem, remedy)


def log_inputs(inputs: TuningInputs, say: Callable[..., None] = LOGGER.info) -> None:
    """Say what was opened."""
    say(
        "tuning %s (%s) on %d records of %s",
        inputs.base,
        inputs.adapter.name,
        len(inputs.mixture),
        inputs.mixture.source,
    )
    for number in inputs.recipe.data.skip_records:
        say("nothing is learned from %s (data.skip_records)", inputs.mixture.name(number))
