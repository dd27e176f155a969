"""`kuea-mllm quickstart`: the whole path on the mini world, in minutes, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, print_json, verb


@verb
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to create.")] = Path(
        "quickstart-report"
    ),
    steps: Annotated[
        int | None, typer.Option(min=10, help="Alignment steps; the recipe's if left out.")
    ] = None,
    questions: Annotated[int, typer.Option(min=20, help="Questions for each of the tasks.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of images, questions and data order.")] = 0,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Also tune both LLaVAs with LoRA, and train a mini Flamingo to compare both "
            "towers at 0 and 4 shots: some minutes more.",
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Align, swap, evaluate and compare on a tiny world that ships with the package.

    Needs no download and no GPU. Ends with the path of an HTML report.
    """
    from kuea_mllm.workflows.quickstart import run_quickstart

    result = run_quickstart(
        out,
        steps=steps,
        questions=questions,
        seed=seed,
        full=full,
        show_progress=not json_output,
    )
    if json_output:
        print_json(result)
    else:
        typer.echo(f"\nreport: {out / 'report.html'}")
