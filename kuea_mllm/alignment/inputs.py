"""Everything an alignment run reads, opened and checked before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, Subset

from kuea_mllm.config.align import AlignRecipe, DataConfig, KernelConfig, PolynomialKernelConfig
from kuea_mllm.data.images import ImageFolder, ImageItem, require_image_folder
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.devices import choose_device
from kuea_mllm.errors import DataError, RecipeError
from kuea_mllm.log import LOGGER
from kuea_mllm.teachers import Teacher, load_teacher
from kuea_mllm.towers.load import Tower, load_tower


@dataclass(frozen=True)
class AlignmentInputs:
    """What a run reads.

    Attributes:
        recipe: With everything settled: device, steps, kernel constants.
        student: The tower; training changes it in place.
        base_fingerprint: Its fingerprint as it was opened.
        teacher: The frozen teacher.
        images: The whole listing.
        listing: Its fingerprint, from before the run.
        training: What is trained on.
        heldout: What is only measured on.
    """

    recipe: AlignRecipe
    student: Tower
    base_fingerprint: str
    teacher: Teacher
    images: ImageFolder
    listing: str
    training: ImageFolder | Subset[ImageItem]
    heldout: Dataset[ImageItem]


def open_inputs(recipe: AlignRecipe) -> AlignmentInputs:
    """Open student, teacher and images and settle what the recipe leaves to them.

    Raises:
        UserError: If an input is missing, unreadable or of the wrong kind.
    """
    recipe = recipe.resolved()
    device = choose_device(recipe.runtime.device)
    student_source = _required(recipe.student.model, "student.model", "--student")
    teacher_source = _required(recipe.teacher.model, "teacher.model", "--teacher")
    image_folder = _required(recipe.data.images, "data.images", "--images")
    # Folders first: they fail in milliseconds, towers take longer to open.
    for folder in filter(None, (image_folder, recipe.data.heldout)):
        require_image_folder(folder)
    student = load_tower(
        student_source,
        activation=recipe.student.activation,
        heads=recipe.student.heads,
        revision=recipe.student.revision,
    )
    transform = ImageTransform.from_spec(student.spec)
    images = ImageFolder(image_folder, transform)
    training, heldout = _split(images, recipe.data, transform)
    teacher = load_teacher(
        teacher_source,
        readout=recipe.teacher.readout,
        normalisation=recipe.teacher.normalisation or "own",
        student_mean=student.spec.mean,
        student_std=student.spec.std,
        image_size=recipe.teacher.image_size,
        revision=recipe.teacher.revision,
    )
    recipe = _settle(
        recipe, device=device, image_count=len(training), student=student, teacher=teacher
    )
    # A file that cannot be decoded at all should end the run now, not after the first epoch.
    images[0]
    heldout[0]
    return AlignmentInputs(
        recipe=recipe,
        student=student,
        base_fingerprint=student.fingerprint,
        teacher=teacher,
        images=images,
        listing=images.fingerprint(),
        training=training,
        heldout=heldout,
    )


def _split(
    images: ImageFolder, data: DataConfig, transform: ImageTransform
) -> tuple[ImageFolder | Subset[ImageItem], Dataset[ImageItem]]:
    """Return what is trained on and what is only measured on."""
    if data.heldout is not None:
        return images, ImageFolder(data.heldout, transform)
    # Without a folder of their own, held-out images are taken out of training, spread evenly over
    # the sorted listing so that every class gives some.
    count = min(data.heldout_count, len(images) // 10)
    if count < 2:
        raise DataError(
            f"image folder {data.images} holds {len(images)} images, too few to hold some out.",
            "Pass --heldout FOLDER with images that are not trained on.",
        )
    chosen = np.linspace(0, len(images) - 1, count).round().astype(np.int64)
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    LOGGER.info("%d of %d images are held out (no --heldout folder)", count, len(images))
    return Subset(images, rest), Subset(images, chosen)  # type: ignore[arg-type]


def _required(value: str | None, key: str, flag: str) -> str:
    if value is None:
        raise RecipeError(f"key '{key}' is not set.", f"Pass {flag} or set it in the recipe.")
    return value


def _settle(
    recipe: AlignRecipe, *, device: str, image_count: int, student: Tower, teacher: Teacher
) -> AlignRecipe:
    """Write out what follows from the inputs: device, number of steps, kernel constants."""
    optim = recipe.optim
    if image_count < optim.batch_size:
        raise DataError(
            f"image folder {recipe.data.images} gives {image_count} training images, "
            f"fewer than one batch of {optim.batch_size}.",
            "Add images or lower optim.batch_size.",
        )
    if optim.steps is None:
        per_epoch = image_count // optim.batch_size
        steps = max(1, math.floor(per_epoch * (optim.epochs or 0)))
        LOGGER.info("%s epochs of %d images are %d steps", optim.epochs, image_count, steps)
        if optim.warmup_steps >= steps:
            raise RecipeError(
                f"optim.warmup_steps ({optim.warmup_steps}) is not smaller than the {steps} steps "
                f"that {optim.epochs} epochs of {image_count} images give."
            )
        optim = optim.model_copy(update={"steps": steps, "epochs": None})
    objective = recipe.objective.model_copy(
        update={
            "student_kernel": _with_gamma(
                recipe.objective.student_kernel, student.spec.embedding_width
            ),
            "teacher_kernel": _with_gamma(recipe.objective.teacher_kernel, teacher.width),
        }
    )
    teacher_config = recipe.teacher.model_copy(update={"image_size": teacher.image_size})
    runtime = recipe.runtime.model_copy(update={"device": device})
    return recipe.model_copy(
        update={
            "optim": optim,
            "objective": objective,
            "teacher": teacher_config,
            "runtime": runtime,
        }
    )


def _with_gamma(kernel: KernelConfig, width: int) -> KernelConfig:
    if isinstance(kernel, PolynomialKernelConfig) and kernel.gamma is None:
        return kernel.model_copy(update={"gamma": 1.0 / width})
    return kernel
