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

from kuea_mllm.errors import KueaError

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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

INTERRUPTED = 130


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: errors become one clear line and an exit code (see `kuea_mllm.errors`)."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        from kuea_mllm.log import configure_terminal

        debug = bool(os.environ.get("KUEA_MLLM_DEBUG"))
        quiet = bool(os.environ.get("KUEA_MLLM_QUIET")) or bool(kwargs.get("json_output"))
        configure_terminal(verbose=debug, quiet=quiet)
        try:
            return function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            fail("interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            if isinstance(error, KueaError):
                fail(str(error))
                raise typer.Exit(error.exit_code) from None
            fail(_unexpected(error))
            raise typer.Exit(1) from None

    return wrapped


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
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return (
            f"out of memory: {text[:300]}\n"
            "  Lower the batch size, or use a smaller precision (--set runtime.precision=bf16)."
        )
    return f"{kind}: {text[:500]}\n  Run again with `kuea-mllm --debug ...` for the traceback."
