"""How a run that does not succeed ends: what a person is told, and what is kept."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from kuea_mllm.data.source import as_raised_in_worker
from kuea_mllm.errors import EnvironmentFailure, Interrupted, TrainingDiverged, UserError
from kuea_mllm.io import name_disk_error
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import current_command
from kuea_mllm.training.distributed import rank
from kuea_mllm.training.interruption import Interruption
from kuea_mllm.training.run_directory import RECIPE, RunDirectory


def explained(error: BaseException, run: RunDirectory) -> BaseException:
    """Return the error as a user should see it, and say what is left of the run."""
    if isinstance(error, UserError | EnvironmentFailure):
        error = as_raised_in_worker(error)
    if rank() != 0 or isinstance(error, Interrupted):
        return error
    checkpoint = run.store.last_good()
    if isinstance(error, TrainingDiverged) and checkpoint is None:
        kept = _keep_evidence(run)
        return TrainingDiverged(
            error.problem, f"{error.remedy} Log, recipe and metrics are kept in {kept}."
        )
    if checkpoint is None:
        return name_disk_error(error, run.out)
    LOGGER.warning("the unfinished run is kept; --resume goes on from %s", checkpoint)
    return name_disk_error(error, run.out, remedy="Free some space and go on with --resume.")


def _keep_evidence(run: RunDirectory) -> Path:
    """Save what shows why a run diverged, under a name that no one takes for a result."""
    number, kept = 1, run.out.with_name(f"{run.out.name}.diverged")
    while kept.exists():
        number += 1
        kept = run.out.with_name(f"{run.out.name}.diverged-{number}")
    kept.mkdir()
    for name in (RECIPE, "run.log", "metrics.jsonl"):
        shutil.copy(run.path / name, kept / name)
    return kept


def interrupted(
    interruption: Interruption, run: RunDirectory, *, verb: str, steps: int
) -> Interrupted:
    """Return the error that says how to go on."""
    return Interrupted(
        f"interrupted at step {interruption.stopped_at} of {steps}; go on with: "
        f"{_resume_command(run, verb)}",
        exit_code=interruption.exit_code,
    )


def _resume_command(run: RunDirectory, verb: str) -> str:
    """Return the command line that goes on with a run, as it was typed if that is known."""
    if Path(sys.argv[0]).name == "kuea-mllm" and verb in sys.argv:
        words = [word for word in shlex.split(current_command()) if word != "--restart"]
        return shlex.join([*words, *([] if "--resume" in words else ["--resume"])])
    recipe, out = str(run.path / RECIPE), str(run.out)
    return shlex.join(["kuea-mllm", verb, "--recipe", recipe, "--out", out, "--resume"])
