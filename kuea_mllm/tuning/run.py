"""From a recipe to a run directory: `adapter/`, metrics, and everything to repeat it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.log import LOGGER, log_file
from kuea_mllm.manifest import current_command
from kuea_mllm.training.distributed import barrier, fails_together, rank, world_size
from kuea_mllm.training.ending import explained, interrupted
from kuea_mllm.training.foreign_settings import refuse_foreign_settings
from kuea_mllm.training.run_directory import RunDirectory, open_run, require_startable
from kuea_mllm.training.trackers import require_trackers
from kuea_mllm.tuning.assemble import TuningAssembly, assemble
from kuea_mllm.tuning.identity import KIND, identify_run
from kuea_mllm.tuning.inputs import TuningInputs, log_inputs, open_tuning_inputs
from kuea_mllm.tuning.liger import require_liger
from kuea_mllm.tuning.merge import merge_adapter
from kuea_mllm.tuning.optimizer import require_device
from kuea_mllm.tuning.output import save_adapter
from kuea_mllm.tuning.record import describe_tuning
from kuea_mllm.tuning.sharding import require_shardable
from kuea_mllm.tuning.shortage import name_shortage

ADAPTER, MERGED = "adapter", "merged"

# Merging 13B parameters on a slow disk takes longer than a step may.
_LONGEST_WRITING = timedelta(hours=12)


@dataclass(frozen=True)
class TuningResult:
    """Where a finished run lies and what it was.

    Attributes:
        directory: Of the run.
        steps: Updates.
        seconds: Of training, all sessions of the run together.
        trainable: Numbers that were trained.
        tower_fingerprint: Of the untouched tower.
        data: What was cut off; see `DataCounter.report`.
        is_merged: Whether `merged` was written.
    """

    directory: Path
    steps: int
    seconds: float
    trainable: int
    tower_fingerprint: str
    data: dict[str, int]
    is_merged: bool

    @property
    def adapter(self) -> Path:
        """The PEFT directory."""
        return self.directory / ADAPTER

    @property
    def merged(self) -> Path | None:
        """The merged model, if there is one."""
        return self.directory / MERGED if self.is_merged else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "directory": str(self.directory),
            "adapter": str(self.adapter),
            "merged": str(self.merged) if self.is_merged else None,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "trainable_parameters": self.trainable,
            "tower_fingerprint": self.tower_fingerprint,
            "data": self.data,
        }


def run_tuning(
    recipe: LoraRecipe,
    out: Path,
    *,
    merge: bool = False,
    progress: bool = True,
    finish: Callable[[Path], None] | None = None,
    resume: bool = False,
    restart: bool = False,
) -> TuningResult:
    """Tune a model's language model and write the run directory.

    Until the run is complete it lies in `OUT.unfinished`.

    Args:
        recipe: What to do; `model.path` and `data.file` must be set.
        out: Directory to create.
        merge: Also write a plain model directory with the LoRA layers merged.
        progress: Show a progress bar.
        finish: Called with the directory before it gets its final name, to add figures.
        resume: Go on with the unfinished run of this output.
        restart: Drop the unfinished run of this output, if there is one.

    Raises:
        UserError: If an input is wrong; nothing is written then.
        TrainingDiverged: If a loss is not finite.
        Interrupted: If the process was asked to stop; `resume` goes on.
    """
    out = Path(out)
    require_startable(out, kind=KIND, resume=resume, restart=restart)
    refuse_foreign_settings()
    require_trackers(recipe.runtime.trackers)
    require_shardable(recipe)
    with fails_together():
        inputs = open_tuning_inputs(recipe, progress=progress)
        # Not with the inputs, which are also opened where a run on other machines is planned.
        is_cuda = inputs.recipe.runtime.device.startswith("cuda")
        require_device(inputs.recipe.optim, is_cuda=is_cuda)
        if inputs.recipe.runtime.liger:
            require_liger(is_cuda=is_cuda)
    with (
        open_run(out, identify_run(inputs), resume=resume, restart=restart) as run,
        log_file(run.path / "run.log") if rank() == 0 else nullcontext(),
    ):
        for note in run.notes:
            LOGGER.info("%s", note)
        try:
            result = _tune(inputs, run, merge=merge, progress=progress, finish=finish)
        except BaseException as error:
            raise explained(name_shortage(error, inputs, run), run) from error.__cause__
    # The others must not report before the directory has its final name.
    barrier()
    return result


def _tune(
    inputs: TuningInputs,
    run: RunDirectory,
    *,
    merge: bool,
    progress: bool,
    finish: Callable[[Path], None] | None,
) -> TuningResult:
    log_inputs(inputs)
    parts = assemble(inputs, run, progress=progress)
    started = time.perf_counter()
    before = float(run.state.get("seconds", 0.0))
    resumed_at = list(run.state.get("resumed_at", []))
    if run.start_step is not None:
        resumed_at.append(run.start_step)

    def seconds() -> float:
        return before + time.perf_counter() - started

    def state() -> dict[str, Any]:
        return {"processes": world_size(), "seconds": seconds(), "resumed_at": resumed_at}

    parts.trainer.bind_checkpoints(run.store, state)
    try:
        with parts.interruption.listening():
            parts.trainer.train_from(run.checkpoint, run.start_step or 0)
        with fails_together():
            run.store.wait()
    finally:
        parts.metrics.close()
    steps = parts.trainer.state.max_steps
    if parts.interruption.stopped_at is not None:
        raise interrupted(parts.interruption, run, verb="lora", steps=steps)
    if parts.interruption.received is not None:
        LOGGER.info("training was complete when the signal came: writing the result")
    took = seconds()
    counts = parts.counter.exchange()
    with fails_together(), _patiently():
        if rank() == 0:
            # Of a session that ended while it wrote them.
            for name in (ADAPTER, MERGED):
                shutil.rmtree(run.path / name, ignore_errors=True)
            _write_result(inputs, parts, run, counts, seconds=took, resumed_at=resumed_at)
            if merge:
                merge_adapter(
                    inputs.base,
                    run.path / ADAPTER,
                    run.path / MERGED,
                    # Where it will lie when the run is complete.
                    reference=str(run.out / ADAPTER),
                    mllm=inputs.adapter,
                    command=current_command(),
                )
            if finish is not None:
                finish(run.path)
    return TuningResult(
        directory=run.out,
        steps=parts.trainer.state.global_step,
        seconds=took,
        trainable=parts.receipt.trainable,
        tower_fingerprint=parts.tower_fingerprint,
        data=counts,
        is_merged=merge,
    )


@contextmanager
def _patiently() -> Iterator[None]:
    """Let the other processes wait for process zero longer than they wait in a step."""
    if world_size() == 1:
        yield
        return
    group: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WRITING)
    try:
        yield
    finally:
        dist.barrier(group=group)


def _write_result(
    inputs: TuningInputs,
    parts: TuningAssembly,
    run: RunDirectory,
    counts: dict[str, int],
    *,
    seconds: float,
    resumed_at: list[int],
) -> None:
    parts.require_untouched_tower(inputs)
    LOGGER.info("vision tower unchanged: %s", parts.tower_fingerprint)
    manifest = describe_tuning(
        inputs,
        parts.receipt,
        tower_fingerprint=parts.tower_fingerprint,
        steps=parts.trainer.state.global_step,
        data_counts=counts,
        processes=world_size(),
        seconds=round(seconds, 1),
        resumed_at=resumed_at,
    )
    save_adapter(parts.model.wrapped, run.path / ADAPTER, manifest=manifest)
