"""From a recipe to a run directory: `tower/`, metrics, figures and everything to repeat it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kuea_mllm.alignment.callbacks import (
    AlignmentProgress,
    Measure,
    MetricsFile,
    StopWhenDiverged,
)
from kuea_mllm.alignment.heldout import HeldOut
from kuea_mllm.alignment.targets import LiveTargets
from kuea_mllm.alignment.trainer import AlignmentModel, AlignmentTrainer
from kuea_mllm.config.align import AlignRecipe, KernelConfig, PolynomialKernelConfig
from kuea_mllm.config.recipes import recipe_to_yaml
from kuea_mllm.data.images import ImageFolder, require_image_folder
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.devices import choose_device
from kuea_mllm.errors import DataError, RecipeError
from kuea_mllm.io import atomic_directory, require_free_output, write_json
from kuea_mllm.kernels import CosineKernel, GaussianKernel, Kernel, PolynomialKernel
from kuea_mllm.log import LOGGER, log_file
from kuea_mllm.manifest import SCHEMA_VERSION, current_command, library_versions, utc_now
from kuea_mllm.objectives import KernelAlignmentObjective
from kuea_mllm.teachers import Teacher, load_teacher
from kuea_mllm.towers.encode import TowerEncoder
from kuea_mllm.towers.load import Tower, load_tower
from kuea_mllm.towers.save import save_tower


@dataclass(frozen=True)
class AlignmentInputs:
    """Everything a run reads, opened and checked before anything is written."""

    recipe: AlignRecipe  # resolved: device, steps and kernel constants written out
    student: Tower
    base_fingerprint: str  # taken now, since training changes the tower in place
    teacher: Teacher
    images: ImageFolder
    heldout: ImageFolder


@dataclass(frozen=True)
class AlignmentResult:
    """Where a finished run lies and what it measured."""

    directory: Path
    before: dict[str, float]
    after: dict[str, float]
    seconds: float

    @property
    def tower(self) -> Path:
        """The aligned tower."""
        return self.directory / "tower"


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
    heldout = ImageFolder(recipe.data.heldout, transform) if recipe.data.heldout else images
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
        recipe, device=device, image_count=len(images), student=student, teacher=teacher
    )
    # A file that cannot be decoded at all should end the run now, not after the first epoch.
    images[0]
    heldout[len(heldout) - 1]
    return AlignmentInputs(recipe, student, student.fingerprint, teacher, images, heldout)


def run_alignment(
    recipe: AlignRecipe,
    out: Path,
    *,
    progress: bool = True,
    finish: Callable[[Path], None] | None = None,
) -> AlignmentResult:
    """Align a tower and write the run directory.

    Args:
        recipe: What to do; `student.model`, `teacher.model` and `data.images` must be set.
        out: Directory to create.
        progress: Show a progress bar.
        finish: Called with the directory before it gets its final name, to add figures.

    Raises:
        UserError: If an input is wrong; nothing is written then.
        TrainingDiverged: If a loss is not finite or a kernel parameter lost its sign.
    """
    require_free_output(out)
    inputs = open_inputs(recipe)
    with atomic_directory(out) as partial, log_file(partial / "run.log"):
        (partial / "run.yaml").write_text(recipe_to_yaml(inputs.recipe), encoding="utf-8")
        before, after, seconds = _train(inputs, partial, progress=progress)
        if finish is not None:
            finish(partial)
    return AlignmentResult(directory=out, before=before, after=after, seconds=seconds)


def build_kernel(config: KernelConfig, width: int) -> Kernel:
    """Build the kernel module that a recipe describes, for embeddings of `width`."""
    if isinstance(config, PolynomialKernelConfig):
        gamma = 1.0 / width if config.gamma is None else config.gamma
        return PolynomialKernel(
            gamma, config.coef0, degree=config.degree, trainable=bool(config.trainable)
        )
    if config.type == "gaussian":
        return GaussianKernel(config.sigma, trainable=bool(config.trainable))
    return CosineKernel()


def _required(value: str | None, key: str, flag: str) -> str:
    if value is None:
        raise RecipeError(f"key '{key}' is not set.", f"Pass {flag} or set it in the recipe.")
    return value


def _train(
    inputs: AlignmentInputs, directory: Path, *, progress: bool
) -> tuple[dict[str, float], dict[str, float], float]:
    recipe = inputs.recipe
    torch.manual_seed(recipe.runtime.seed)
    device = torch.device(recipe.runtime.device)
    student = TowerEncoder(inputs.student)
    original = copy.deepcopy(student)
    objective = KernelAlignmentObjective(
        build_kernel(recipe.objective.student_kernel, inputs.student.spec.embedding_width),
        build_kernel(recipe.objective.teacher_kernel, inputs.teacher.width),
        kernel_weight=recipe.objective.kernel_weight,
        preserve_weight=recipe.objective.preserve_weight,
    )
    initial_kernel = objective.student_kernel.constants()
    model = AlignmentModel(student, objective).to(device)
    targets = LiveTargets(inputs.teacher, original, device)
    heldout = HeldOut(
        inputs.heldout,
        count=recipe.data.heldout_count,
        targets=targets,
        student=student,
        objective=objective,
        device=device,
        batch_size=recipe.optim.batch_size,
    )
    metrics = MetricsFile(directory / "metrics.jsonl", batch_size=recipe.optim.batch_size)
    measure = Measure(heldout.measure, every=recipe.runtime.measure_every)
    trainer = AlignmentTrainer(
        model,
        targets,
        inputs.images,
        optim=recipe.optim,
        runtime=recipe.runtime,
        output_dir=directory / "trainer",
        workers=recipe.data.workers,
        callbacks=[metrics, StopWhenDiverged(objective.student_kernel.check), measure],
    )
    measure.bind(trainer.log_measurement)
    # Rows go to metrics.jsonl; printing each of them too would bury everything else.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress:
        trainer.add_callback(AlignmentProgress)
    started = time.perf_counter()
    try:
        trainer.train()
    finally:
        metrics.close()
    seconds = time.perf_counter() - started
    LOGGER.info(
        "held-out kernel gap %.4g -> %.4g, mean cosine to the original %.3f, %.0f s",
        measure.first["heldout_kernel_gap"],
        measure.last["heldout_kernel_gap"],
        measure.last["heldout_drift_cosine_mean"],
        seconds,
    )
    manifest = _manifest(
        inputs,
        kernel={"initial": initial_kernel, "final": objective.student_kernel.constants()},
        measured={"before": measure.first, "after": measure.last, "images": heldout.count},
    )
    student.to("cpu")
    save_tower(inputs.student, directory / "tower", manifest=manifest)
    write_json(
        directory / "kernel_matrices.json",
        {name: matrix.cpu().tolist() for name, matrix in heldout.kernel_matrices().items()},
    )
    return measure.first, measure.last, seconds


def _settle(
    recipe: AlignRecipe, *, device: str, image_count: int, student: Tower, teacher: Teacher
) -> AlignRecipe:
    """Write out what follows from the inputs: device, number of steps, kernel constants."""
    optim = recipe.optim
    if image_count < optim.batch_size:
        raise DataError(
            f"image folder {recipe.data.images} holds {image_count} images, "
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


def _manifest(
    inputs: AlignmentInputs, *, kernel: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    recipe, student = inputs.recipe, inputs.student
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "tower",
        "base_tower": {
            "reference": str(recipe.student.model),
            "layout": student.layout,
            "fingerprint": inputs.base_fingerprint,
        },
        "teacher": {
            "reference": str(recipe.teacher.model),
            "fingerprint": inputs.teacher.fingerprint,
            "readout": recipe.teacher.readout,
            "normalisation": recipe.teacher.normalisation,
            "image_size": inputs.teacher.image_size,
        },
        "objective": recipe.objective.model_dump(mode="json"),
        "kernel": kernel,
        "compat": recipe.compat,
        "optim": recipe.optim.model_dump(mode="json"),
        "data": {"images": len(inputs.images), "listing": inputs.images.fingerprint()},
        "heldout": measured,
        "versions": library_versions(),
        "command": current_command(),
        "created": utc_now(),
    }
