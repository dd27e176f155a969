"""From a recipe to a run directory: `tower/`, metrics, figures and everything to repeat it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.alignment.assemble import Assembly, assemble
from kuea_mllm.alignment.heads import save_heads
from kuea_mllm.alignment.identity import KIND, identify_run
from kuea_mllm.alignment.inputs import AlignmentInputs, open_inputs
from kuea_mllm.alignment.record import describe_run
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.errors import (
    RecipeError,
)
from kuea_mllm.io import write_json
from kuea_mllm.log import LOGGER, log_file
from kuea_mllm.towers.writing.save import save_tower
from kuea_mllm.training.distributed import barrier, fails_together, rank, world_size
from kuea_mllm.training.ending import explained, interrupted
from kuea_mllm.training.foreign_settings import refuse_foreign_settings
from kuea_mllm.training.memory import is_out_of_memory, out_of_memory
from kuea_mllm.training.run_directory import (
    RunDirectory,
    open_run,
    require_startable,
)
from kuea_mllm.training.trackers import require_trackers


@dataclass(frozen=True)
class AlignmentResult:
    """Where a finished run lies and what it measured; only process zero measures.

    Attributes:
        directory: Of the run.
        before: Measurements of the untouched tower.
        after: Measurements of the aligned one.
        seconds: Of training, all sessions of the run together.
    """

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
    resume: bool = False,
    restart: bool = False,
) -> AlignmentResult:
    """Align a tower and write the run directory.

    Until the run is complete it lies in `OUT.unfinished`.

    Args:
        recipe: What to do; `student.model`, `teacher.model` and `data.images` must be set.
        out: Directory to create.
        progress: Show a progress bar.
        finish: Called with the directory before it gets its final name, to add figures.
        resume: Go on with the unfinished run of this output.
        restart: Drop the unfinished run of this output, if there is one.

    Raises:
        UserError: If an input is wrong; nothing is written then.
        TrainingDiverged: If a loss is not finite or a kernel parameter lost its sign.
        Interrupted: If the process was asked to stop; `resume` goes on.
    """
    out = Path(out)
    if recipe.method != "align":
        raise RecipeError(f"key 'method' is {recipe.method!r}: nothing is trained by it.")
    require_startable(out, kind=KIND, resume=resume, restart=restart)
    refuse_foreign_settings()
    require_trackers(recipe.runtime.trackers)
    with fails_together():
        inputs = open_inputs(recipe)
    with open_run(out, identify_run(inputs), resume=resume, restart=restart) as run:
        is_writer = rank() == 0
        with log_file(run.path / "run.log") if is_writer else nullcontext():
            for note in run.notes:
                LOGGER.info("%s", note)
            try:
                result = _align(inputs, run, progress=progress, finish=finish)
            except BaseException as error:
                raise explained(_named(error, inputs), run) from error.__cause__
        # The others must not report before the directory has its final name.
    barrier()
    return result


def _named(error: BaseException, inputs: AlignmentInputs) -> BaseException:
    if not is_out_of_memory(error):
        return error
    recipe, runtime = inputs.recipe, inputs.recipe.runtime
    share = recipe.optim.batch_size // world_size()
    smaller = max(1, (runtime.micro_batch_size or share) // 2)
    saving = "" if runtime.gradient_checkpointing else " or runtime.gradient_checkpointing=true"
    return out_of_memory(
        error,
        f"on {runtime.device} while aligning {recipe.student.model}",
        f"Set runtime.micro_batch_size={smaller}{saving}: the result is the same but for rounding, "
        "so that an unfinished run may go on with it (--resume). `kuea-mllm plan` says what fits.",
    )


def _align(
    inputs: AlignmentInputs,
    run: RunDirectory,
    *,
    progress: bool,
    finish: Callable[[Path], None] | None,
) -> AlignmentResult:
    parts = assemble(inputs, run, progress=progress)
    started = time.perf_counter()
    before = float(run.state.get("seconds", 0.0))
    resumed_at = list(run.state.get("resumed_at", []))
    if run.start_step is not None:
        resumed_at.append(run.start_step)

    def seconds() -> float:
        return before + time.perf_counter() - started

    def state() -> dict[str, Any]:
        return {
            "processes": world_size(),
            "seconds": seconds(),
            "resumed_at": resumed_at,
            **parts.state(),
        }

    parts.trainer.bind_checkpoints(run.store, state)
    try:
        with parts.interruption.listening():
            parts.trainer.train(
                resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint)
            )
        with fails_together():
            run.store.wait()
    finally:
        parts.metrics.close()
    if parts.interruption.stopped_at is not None:
        raise interrupted(
            parts.interruption, run, verb="align", steps=inputs.recipe.optim.steps or 0
        )
    if parts.interruption.received is not None:
        LOGGER.info("training was complete when the signal came: writing the result")
    took = seconds()
    with fails_together():
        if rank() == 0:
            parts.measure.measure_now(parts.trainer.state)
            parts.metrics.close()
            _write_result(inputs, parts, run.path, seconds=took, resumed_at=resumed_at)
            if finish is not None:
                finish(run.path)
    return AlignmentResult(run.out, parts.measure.first, parts.measure.last, took)


def _write_result(
    inputs: AlignmentInputs,
    parts: Assembly,
    directory: Path,
    *,
    seconds: float,
    resumed_at: list[int],
) -> None:
    measure = parts.measure
    LOGGER.info(
        "held-out kernel gap %.4g -> %.4g, mean cosine to the original %.3f, %.0f s",
        measure.first["heldout_kernel_gap"],
        measure.last["heldout_kernel_gap"],
        measure.last["heldout_drift_cosine_mean"],
        seconds,
    )
    manifest = describe_run(
        inputs,
        kernel={"initial": parts.initial_kernel, "final": parts.kernel_constants},
        measured={
            "before": measure.first,
            "after": measure.last,
            "best": {"step": measure.best_step, **measure.best},
            "images": parts.heldout.count,
        },
        steps=parts.trainer.state.global_step,
        stopped_early=parts.early_stop.reason if parts.early_stop else None,
        images_left_out=parts.unreadable.report(),
        processes=world_size(),
        seconds=round(seconds, 1),
        resumed_at=resumed_at,
    )
    save_tower(inputs.student, directory / "tower", manifest=manifest)
    save_heads(parts.objective, directory, manifest=manifest)
    parts.attention.save(directory / "attention.npz")
    write_json(
        directory / "kernel_matrices.json",
        {name: matrix.cpu().tolist() for name, matrix in parts.heldout.kernel_matrices().items()},
    )
