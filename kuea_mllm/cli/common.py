"""What all verbs share: options, errors as lines, output for people or machines."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from kuea_mllm.errors import KueaError, Terminated
from kuea_mllm.launch import (
    TIMEOUT_VARIABLE,
    FailedElsewhere,
    has_parent,
    launched_rank,
    lost_another,
    report_failure,
    timeout_minutes,
)

P = ParamSpec("P")
R = TypeVar("R")

Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to create.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one key of the recipe, e.g. optim.lr=2e-5."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the resolved plan, stop.")
]
Activation = Annotated[
    str | None,
    typer.Option(
        help="quick_gelu, gelu or gelu_pytorch_tanh: for checkpoint files, which do not state it."
    ),
]
Heads = Annotated[
    int | None,
    typer.Option(help="Attention heads, for checkpoint files with another width than 64 each."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what lies unfinished beside --out.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Drop what lies unfinished beside --out.")]
NumProcesses = Annotated[
    int,
    typer.Option("--num-processes", min=1, help="Processes on this machine, one for each GPU."),
]

INTERRUPTED = 130
TERMINATED = 143


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: errors become one clear line and an exit code (see `kuea_mllm.errors`)."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        debug = bool(os.environ.get("KUEA_MLLM_DEBUG"))
        quiet = bool(os.environ.get("KUEA_MLLM_QUIET")) or bool(kwargs.get("json_output"))
        _configure_log(debug=debug, quiet=quiet)
        try:
            return function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as error:
            code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
            _end("interrupted.", code)
            raise typer.Exit(code) from None
        except BrokenPipeError:
            # Who reads our output has seen enough (`| head`); what is left to print has no reader.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            # The output of other processes goes to files, where a traceback disturbs no one.
            if debug or (has_parent() and launched_rank() > 0):
                traceback.print_exc()
            if isinstance(error, KueaError):
                _end(str(error), error.exit_code, is_echo=isinstance(error, FailedElsewhere))
                raise typer.Exit(error.exit_code) from None
            _end(_unexpected(error), 1, is_echo=lost_another(error))
            raise typer.Exit(1) from None

    return wrapped


def _configure_log(*, debug: bool, quiet: bool) -> None:
    import logging

    from kuea_mllm.log import LOGGER, configure_terminal

    configure_terminal(verbose=debug, quiet=quiet)
    if launched_rank() > 0 and not has_parent():
        # Process zero has said it. With a parent, the output of the others goes to files.
        for handler in LOGGER.handlers:
            handler.setLevel(logging.ERROR)


def _end(message: str, exit_code: int, *, is_echo: bool = False) -> None:
    """Print an error, or leave it to the parent or to the process that failed first."""
    if has_parent():
        report_failure(message, exit_code=exit_code, is_echo=is_echo)
    elif not is_echo or launched_rank() == 0:
        where = f"process {launched_rank()}: " if launched_rank() else ""
        fail(where + message)


def fail(message: str) -> None:
    """Print an error in the form of all errors."""
    typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
    typer.echo(message, err=True)


def print_json(content: Any) -> None:
    """Print one JSON object on standard output."""
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def _unexpected(error: Exception) -> str:
    kind = type(error).__name__
    text = " ".join(str(error).split()) or "no message"
    if lost_another(error):
        return (
            f"process {launched_rank()} lost another process, which died or was silent for "
            f"{timeout_minutes():g} minutes ({TIMEOUT_VARIABLE}): {text[:200]}"
        )
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return (
            f"out of memory: {text[:300]}\n"
            "  Lower the batch size, or use a smaller precision (--set runtime.precision=bf16)."
        )
    return f"{kind}: {text[:500]}\n  Run again with `kuea-mllm --debug ...` for the traceback."
