"""`kuea-mllm judge`: let a language model grade answers that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, Out, print_json, verb


@verb
def judge(
    results: Annotated[Path, typer.Argument(help="Results of `kuea-mllm eval`.")],
    out: Out,
    url: Annotated[
        str,
        typer.Option("--judge-url", help="OpenAI-compatible endpoint, e.g. http://host:8000/v1."),
    ],
    model: Annotated[str, typer.Option("--judge-model", help="Model that it is asked for.")],
    key_variable: Annotated[
        str, typer.Option("--judge-key", help="Environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the judge.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 60.0,
    retries: Annotated[int, typer.Option(min=0, help="Of a request without a verdict.")] = 3,
    max_failures: Annotated[
        int, typer.Option(min=0, help="Answers that may stay without a verdict.")
    ] = 0,
    json_output: Json = False,
) -> None:
    """Grade the answers of LLaVA-Bench in finished results; writes new results to OUT.

    Columns that have no score because no judge was given get one. Results of another judge are
    graded anew as a whole. If the judge fails, its verdicts stay in OUT.verdicts: run it again.
    """
    from pydantic import ValidationError

    from kuea_mllm.config.evaluate import JudgeSettings
    from kuea_mllm.errors import EvaluationError
    from kuea_mllm.evaluation.judging.finished import judge_results
    from kuea_mllm.manifest import current_command

    try:
        settings = JudgeSettings(
            url=url,
            model=model,
            api_key_env=key_variable,
            temperature=temperature,
            concurrency=concurrency,
            timeout_s=timeout,
            retries=retries,
        )
    except ValidationError as error:
        # Without what was given, which may be a key.
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise EvaluationError(f"the judge cannot be asked like that: {reason}.") from None
    summary = judge_results(
        results,
        settings,
        out,
        max_failures=max_failures,
        command=current_command(),
        show_progress=not json_output,
    )
    from kuea_mllm.reporting.results_report import REPORT, write_results_report

    write_results_report(out / REPORT, out)
    if json_output:
        print_json(summary)
        return
    from kuea_mllm.reporting.tables import print_summary

    print_summary(summary)
    typer.echo(f"results: {out}")
    typer.echo(f"report: {out / REPORT}")
