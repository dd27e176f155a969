"""`kuea-mllm compare`: is B better than A?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kuea_mllm.cli.common import Json, print_json, verb


class Format(StrEnum):
    """What `compare` prints."""

    TEXT = "text"
    MARKDOWN = "markdown"
    LATEX = "latex"
    JSON = "json"


@verb
def compare(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE RUN...",
            help="Results of `kuea-mllm eval`: the baseline, then what is compared with it. "
            "LABEL=DIR names a system; runs with the same label are its seeds, paired in order.",
            show_default=False,
        ),
    ],
    report: Annotated[
        Path | None, typer.Option("--report", help="HTML file to write.", show_default=False)
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="What to print; all formats show the same numbers.")
    ] = Format.TEXT,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    common_only: Annotated[
        bool, typer.Option("--common-only", help="Compare only the columns that all have.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Compare evaluations question by question, with 95 % confidence intervals.

    Differences are paired and resampled by image; the verdict is better, worse or cannot tell.
    """
    from kuea_mllm.evaluation.comparing.compare import compare_systems, comparisons_json
    from kuea_mllm.evaluation.comparing.systems import load_systems

    if report is not None:
        from kuea_mllm.io import require_free_output

        require_free_output(report)
    comparison = comparisons_json(
        compare_systems(
            load_systems(results), resamples=resamples, seed=seed, common_only=common_only
        )
    )
    if report is not None:
        from kuea_mllm.reporting.comparison import write_comparison_report

        write_comparison_report(report, comparison=comparison)
    shown = Format.JSON if json_output else output
    _print(comparison, shown)
    if report is not None and shown is Format.TEXT:
        typer.echo(f"report: {report}")


def _print(comparison: dict[str, Any], shown: Format) -> None:
    if shown is Format.JSON:
        print_json(comparison)
    elif shown is Format.MARKDOWN:
        from kuea_mllm.reporting.markdown import comparison_markdown

        typer.echo(comparison_markdown(comparison), nl=False)
    elif shown is Format.LATEX:
        from kuea_mllm.reporting.latex import comparison_latex

        typer.echo(comparison_latex(comparison), nl=False)
    else:
        from kuea_mllm.reporting.tables import print_comparison

        print_comparison(comparison)
