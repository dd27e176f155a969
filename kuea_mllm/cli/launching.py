"""Several processes of one verb."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer

from kuea_mllm.cli.common import fail
from kuea_mllm.errors import UserError
from kuea_mllm.launch import is_launched_by_torchrun, launch, launched_world_size


def refuse_two_launchers(processes: int) -> None:
    """Refuse `--num-processes` in a process that torchrun started.

    Raises:
        UserError: If it is one.
    """
    if is_launched_by_torchrun():
        raise UserError(
            f"--num-processes {processes} was given to a process that torchrun started "
            f"(one of {launched_world_size()}).",
            "Leave the option out under torchrun, or start the command without torchrun.",
        )


def launch_processes(processes: int, out: Path) -> None:
    """Start this command several times on this machine, and end as they do.

    Args:
        processes: How many.
        out: Of the run, for the line that says how to go on.
    """
    arguments = sys.argv[1:]
    words = [word for word in arguments if word not in {"--restart", "--resume"}]
    again = shlex.join(["kuea-mllm", *words])
    unfinished = out.with_name(f"{out.name}.unfinished")
    # Of an evaluation of two models, either may be the one that is unfinished.
    evaluations = (unfinished, *(out / f"{name}.unfinished" for name in ("baseline", "candidate")))
    outcome = launch(
        arguments,
        processes=processes,
        resume=lambda: (
            f"Go on with: {again} --resume"
            if any(unfinished.glob("checkpoints/checkpoint-*")) or any(map(_holds, evaluations))
            else f"No checkpoint was due yet; start again with: {again} --restart"
        ),
    )
    if outcome.message is not None:
        fail(outcome.message)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _holds(evaluation: Path) -> bool:
    """Say whether an unfinished evaluation has kept an answer."""
    return any(any(evaluation.glob(pattern)) for pattern in ("columns/[!.]*", "answers/*/*.jsonl"))
