"""From a recipe to a run directory: `tower/`, metrics, figures and everything to repeat it."""

from __future__ import annotations

import copy
import shutil
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
from kuea_mllm.alignment.inputs import AlignmentInputs, open_inputs
from kuea_mllm.alignment.targets import LiveTargets
from kuea_mllm.alignment.trainer import AlignmentModel, AlignmentTrainer
from kuea_mllm.config.align import AlignRecipe, KernelConfig, PolynomialKernelConfig
from kuea_mllm.config.recipes import recipe_to_yaml
from kuea_mllm.data.images import as_raised_in_worker
from kuea_mllm.errors import TrainingDiverged, UnreadableImage
from kuea_mllm.io import atomic_directory, require_free_output, write_json
from kuea_mllm.kernels import CosineKernel, GaussianKernel, Kernel, PolynomialKernel
from kuea_mllm.log import LOGGER, log_file
from kuea_mllm.manifest import SCHEMA_VERSION, current_command, library_versions, utc_now
from kuea_mllm.objectives import KernelAlignmentObjective
from kuea_mllm.towers.encode import TowerEncoder
from kuea_mllm.towers.save import save_tower


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
        try:
            before, after, seconds = _train(inputs, partial, progress=progress)
        except UnreadableImage as error:
            raise as_raised_in_worker(error) from None
        except TrainingDiverged as error:
            kept = _keep_evidence(partial, out)
            raise TrainingDiverged(
                error.problem, f"{error.remedy} Log, recipe and metrics are kept in {kept}."
            ) from error
        if finish is not None:
            finish(partial)
    return AlignmentResult(directory=out, before=before, after=after, seconds=seconds)


def _keep_evidence(partial: Path, out: Path) -> Path:
    """Save what shows why a run diverged, under a name that no one takes for a result."""
    number, kept = 1, out.with_name(f"{out.name}.diverged")
    while kept.exists():
        number += 1
        kept = out.with_name(f"{out.name}.diverged-{number}")
    kept.mkdir()
    for name in ("run.yaml", "run.log", "metrics.jsonl"):
        shutil.copy(partial / name, kept / name)
    return kept


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
        inputs.training,
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
    save_tower(inputs.student, directory / "tower", manifest=manifest)
    write_json(
        directory / "kernel_matrices.json",
        {name: matrix.cpu().tolist() for name, matrix in heldout.kernel_matrices().items()},
    )
    return measure.first, measure.last, seconds


def _manifest(
    inputs: AlignmentInputs, *, kernel: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    recipe, student = inputs.recipe, inputs.student
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "tower",
        "base_tower": {
            "reference": str(recipe.student.model),
            "revision": recipe.student.revision,
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
        "runtime": recipe.runtime.model_dump(mode="json"),
        "data": {
            "images": len(inputs.images),
            "trained_on": len(inputs.training),
            "listing": inputs.listing,
            "heldout": recipe.data.heldout or "taken out of the training folder",
        },
        "heldout": measured,
        "versions": library_versions(),
        "command": current_command(),
        "created": utc_now(),
    }
