"""Everything an alignment run reads, opened and checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from kuea_mllm.config.align import (
    AlignRecipe,
    KernelConfig,
    PolynomialKernelConfig,
    SumKernelConfig,
    TeacherConfig,
)
from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.open import open_images
from kuea_mllm.data.selection import select_positions
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.data.unreadable import SkipPolicy
from kuea_mllm.devices import choose_device
from kuea_mllm.errors import DataError, RecipeError
from kuea_mllm.log import LOGGER
from kuea_mllm.teachers import Teacher, load_teacher
from kuea_mllm.towers.model.fingerprint import fingerprint_all
from kuea_mllm.towers.reading.load import Tower, load_tower
from kuea_mllm.training.distributed import rank, world_size


@dataclass(frozen=True)
class TrainingImages:
    """What is trained on and what is only measured on.

    Attributes:
        training: Items {"pixels", "index", "checksum"}; map-style, or a stream.
        positions: Positions of `training` that are trained on, sorted; None for a stream.
        heldout: Items to measure on, without random transform.
        heldout_positions: Which of them, sorted.
        shares_listing: Whether `heldout` is a part of the training listing.
        listing: Fingerprint of the training listing.
    """

    training: Dataset[Any]
    positions: NDArray[np.int64] | None
    heldout: ImageDataset
    heldout_positions: NDArray[np.int64]
    shares_listing: bool
    listing: str

    @property
    def count(self) -> int | None:
        """Images to train on; None where a stream does not tell."""
        return None if self.positions is None else len(self.positions)


@dataclass(frozen=True)
class AlignmentInputs:
    """What a run reads.

    Attributes:
        recipe: With everything settled: device, steps, kernel constants.
        student: The tower; training changes it in place.
        base_fingerprints: Its fingerprints as it was opened; see `fingerprint_all`.
        teachers: The frozen teachers; the recipe's `teacher` first.
        images: What is trained on and measured on.
    """

    recipe: AlignRecipe
    student: Tower
    base_fingerprints: Mapping[str, str]
    teachers: tuple[Teacher, ...]
    images: TrainingImages


def open_inputs(recipe: AlignRecipe) -> AlignmentInputs:
    """Open student, teachers and images and settle what the recipe leaves to them.

    Raises:
        UserError: If an input is missing, unreadable or of the wrong kind.
    """
    recipe = recipe.resolved()
    device = choose_device(recipe.runtime.device)
    student_source = _required(recipe.student.model, "student.model", "--student")
    _required(recipe.teacher.model, "teacher.model", "--teacher")
    _required(recipe.data.images, "data.images", "--images")
    student = load_tower(
        student_source,
        activation=recipe.student.activation,
        heads=recipe.student.heads,
        revision=recipe.student.revision,
    )
    images = open_training_images(recipe, ImageTransform.from_spec(student.spec))
    teachers = tuple(
        _open_teacher(config, student, f"extra_teachers.{number - 1}" if number else "teacher")
        for number, config in enumerate((recipe.teacher, *recipe.extra_teachers))
    )
    recipe = _settle(recipe, device=device, images=images, student=student, teachers=teachers)
    return AlignmentInputs(
        recipe=recipe,
        student=student,
        base_fingerprints=fingerprint_all(student.model.state_dict()),
        teachers=teachers,
        images=images,
    )


def open_training_images(recipe: AlignRecipe, transform: ImageTransform) -> TrainingImages:
    """Open the images of a recipe and divide them into training and held-out ones.

    Raises:
        DataError: If there are too few, or one of them is unreadable right away.
    """
    data, seed = recipe.data, recipe.runtime.seed
    if data.stream:
        return _open_stream(recipe, transform)
    source = open_images(str(data.images), format=data.format, split=data.split, column=data.column)
    everything = np.arange(len(source), dtype=np.int64)
    plain = ImageDataset(source, transform)
    if data.heldout is not None:
        heldout, heldout_positions = _open_heldout(recipe, transform)
        rest = everything
    else:
        heldout = plain
        heldout_positions = _held_out_of(len(source), data.heldout_count, str(data.images))
        rest = np.setdiff1d(everything, heldout_positions)
        LOGGER.info(
            "%d of %d images are held out (no --heldout)", len(heldout_positions), len(source)
        )
    chosen = select_positions(len(rest), fraction=data.fraction, count=data.count, seed=seed)
    positions = rest[chosen]
    skip = SkipPolicy(data.skip_unreadable, positions) if data.skip_unreadable else None
    training = ImageDataset(source, transform, augment=data.augment, seed=seed, skip=skip)
    # A file that cannot be decoded at all should end the run now, not after the first epoch.
    training[int(positions[0])]
    heldout[int(heldout_positions[0])]
    return TrainingImages(
        training=training,
        positions=positions,
        heldout=heldout,
        heldout_positions=heldout_positions,
        shares_listing=data.heldout is None,
        listing=source.fingerprint(),
    )


def spread(population: int, count: int) -> NDArray[np.int64]:
    """Return positions spread evenly over a listing; sorted by class, a prefix would be one."""
    return np.unique(
        np.linspace(0, population - 1, min(count, population)).round().astype(np.int64)
    )


def _open_stream(recipe: AlignRecipe, transform: ImageTransform) -> TrainingImages:
    from kuea_mllm.data.streams import StreamImages, open_stream

    data = recipe.data
    if recipe.data.heldout is None:
        raise RecipeError(
            "key 'data.heldout' is not set, and nothing can be held out of a stream.",
            "Pass --heldout with images that are not trained on.",
        )
    if recipe.data.fraction is not None or recipe.data.count is not None:
        raise RecipeError(
            "keys 'data.fraction' and 'data.count' need images that can be counted.",
            "Name fewer shards, or set data.stream=false.",
        )
    heldout, heldout_positions = _open_heldout(recipe, transform)
    rows = open_stream(str(data.images), format=data.format, split=data.split, column=data.column)
    stream = StreamImages(
        rows,
        transform,
        augment=data.augment,
        seed=recipe.runtime.seed,
        shuffle_buffer=data.shuffle_buffer,
        skip_unreadable=data.skip_unreadable,
        rank=rank(),
        world_size=world_size(),
    )
    stream.require_workers(data.workers)
    return TrainingImages(
        training=stream,
        positions=None,
        heldout=heldout,
        heldout_positions=heldout_positions,
        shares_listing=False,
        listing=f"stream of {len(rows)} shards",
    )


def _open_heldout(
    recipe: AlignRecipe, transform: ImageTransform
) -> tuple[ImageDataset, NDArray[np.int64]]:
    data = recipe.data
    source = open_images(str(data.heldout), split=data.heldout_split, column=data.column)
    if len(source) < 2:
        raise DataError(
            f"{recipe.data.heldout} holds {len(source)} image, and the kernel gap is over pairs.",
            "Pass --heldout with at least two images.",
        )
    return ImageDataset(source, transform), spread(len(source), recipe.data.heldout_count)


def _held_out_of(population: int, wanted: int, where: str) -> NDArray[np.int64]:
    count = min(wanted, population // 10)
    if count < 2:
        raise DataError(
            f"{where} holds {population} images, too few to hold some out.",
            "Pass --heldout FOLDER with images that are not trained on.",
        )
    return spread(population, count)


def _open_teacher(config: TeacherConfig, student: Tower, key: str) -> Teacher:
    return load_teacher(
        _required(config.model, f"{key}.model", "--teacher"),
        readout=config.readout,
        normalisation=config.normalisation or "own",
        student_mean=student.spec.mean,
        student_std=student.spec.std,
        image_size=config.image_size,
        revision=config.revision,
    )


def _required(value: str | None, key: str, flag: str) -> str:
    if value is None:
        raise RecipeError(f"key '{key}' is not set.", f"Pass {flag} or set it in the recipe.")
    return value


def _settle(
    recipe: AlignRecipe,
    *,
    device: str,
    images: TrainingImages,
    student: Tower,
    teachers: tuple[Teacher, ...],
) -> AlignRecipe:
    """Write out what follows from the inputs: device, number of steps, kernel constants."""
    configs = (recipe.teacher, *recipe.extra_teachers)
    settled = [
        config.model_copy(update={"image_size": teacher.image_size})
        for config, teacher in zip(configs, teachers, strict=True)
    ]
    objective = recipe.objective.model_copy(
        update={
            "student_kernel": _with_gamma(
                recipe.objective.student_kernel, student.spec.embedding_width
            ),
            "teacher_kernel": _with_gamma(recipe.objective.teacher_kernel, teachers[0].width),
        }
    )
    return recipe.model_copy(
        update={
            "optim": recipe.optim.model_copy(update=_length(recipe, images.count)),
            "objective": objective,
            "teacher": settled[0],
            "extra_teachers": settled[1:],
            "runtime": recipe.runtime.model_copy(update={"device": device}),
        }
    )


def _length(recipe: AlignRecipe, image_count: int | None) -> dict[str, object]:
    optim = recipe.optim
    if image_count is not None and image_count < optim.batch_size:
        raise DataError(
            f"{recipe.data.images} gives {image_count} training images, "
            f"fewer than one batch of {optim.batch_size}.",
            "Add images or lower optim.batch_size.",
        )
    if optim.steps is not None:
        return {}
    if image_count is None:
        raise RecipeError(
            "key 'optim.epochs' needs images that can be counted, and data.stream is on.",
            "Set optim.steps instead.",
        )
    per_epoch = image_count // optim.batch_size
    steps = max(1, math.floor(per_epoch * (optim.epochs or 0)))
    LOGGER.info("%s epochs of %d images are %d steps", optim.epochs, image_count, steps)
    if optim.warmup_steps >= steps:
        raise RecipeError(
            f"optim.warmup_steps ({optim.warmup_steps}) is not smaller than the {steps} steps "
            f"that {optim.epochs} epochs of {image_count} images give."
        )
    return {"steps": steps, "epochs": None}


def _with_gamma(kernel: KernelConfig, width: int) -> KernelConfig:
    if isinstance(kernel, SumKernelConfig):
        parts = [
            part.model_copy(update={"kernel": _with_gamma(part.kernel, width)})
            for part in kernel.kernels
        ]
        return kernel.model_copy(update={"kernels": parts})
    if isinstance(kernel, PolynomialKernelConfig) and kernel.gamma is None:
        return kernel.model_copy(update={"gamma": 1.0 / width})
    return kernel
