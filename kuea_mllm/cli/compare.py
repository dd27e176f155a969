"""`kuea-mllm compare`: is B better than A?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, print_json, verb


@verb
def compare(
    baseline: Annotated[Path, typer.Argument(help="Results of `kuea-mllm eval`.")],
    candidate: Annotated[Path, typer.Argument(help="Results compared with them.")],
    report: Annotated[
        Path | None, typer.Option("--report", help="HTML file to write.", show_default=False)
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    common_only: Annotated[
        bool, typer.Option("--common-only", help="Compare only the columns that both have.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Compare two evaluations question by question, with 95 % confidence intervals.

    Differences are paired and resampled by image; the verdict is better, worse or cannot tell.
    """
    from kuea_mllm.evaluation.compare import compare_results

    if report is not None:
        from kuea_mllm.io import require_free_output

        require_free_output(report)
    comparison = compare_results(
        baseline, candidate, resamples=resamples, seed=seed, common_only=common_only
    ).to_json()
    if report is not None:
        from kuea_mllm.reporting.comparison import write_comparison_report

        write_comparison_report(
            report, comparison=comparison, baseline=baseline, candidate=candidate
        )
    if json_output:
        print_json(comparison)
        return
    from kuea_mllm.reporting.tables import print_comparison

    print_comparison(comparison)
    if report is not None:
        typer.echo(f"report: {report}")
