"""`kuea-mllm eval`: score an MLLM with lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.common import (
    DryRun,
    Json,
    Out,
    Restart,
    Resume,
    SetOption,
    print_json,
    verb,
)
from kuea_mllm.cli.launching import launch_processes, refuse_two_launchers
from kuea_mllm.launch import has_parent, launched_rank

if TYPE_CHECKING:
    from kuea_mllm.config.evaluate import EvalRecipe


@verb
def evaluate(
    model: Annotated[Path, typer.Option(help="Directory of the MLLM.")],
    out: Out,
    against: Annotated[
        Path | None,
        typer.Option(help="Directory of another MLLM: evaluate it too, and compare MODEL with it."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Columns of the paper: llava-paper, flamingo-paper, quick.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Of the suite: paper, padded, lmms-eval; open-flamingo, open-flamingo-released."
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Comma-separated: only these columns of the suite.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with one sub-folder for each data set.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Comma-separated: lmms-eval task names, YAML files, folders of them."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file.")
    ] = None,
    mllm: Annotated[
        str | None, typer.Option(help="Adapter; recognised from MODEL if left out.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions answered at once.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only N documents of each task.")] = None,
    limit_seed: Annotated[
        int | None,
        typer.Option(
            help="Draw those N at random with this seed. Without it suites take 0, and other tasks "
            "their first N."
        ),
    ] = None,
    shots: Annotated[
        str | None, typer.Option(help="Few-shot: comma-separated numbers of demonstrations.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Few-shot: number of seeds.")] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint that grades LLaVA-Bench.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model that it is asked for.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Model class of lmms-eval to run instead of ours.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one for each GPU.")
    ] = None,
    overrides: SetOption = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    restart: Restart = False,
    json_output: Json = False,
) -> None:
    """Answer the questions of benchmarks and let lmms-eval score them.

    Writes OUT/summary.json, report.html, samples/*.jsonl and lmms-eval's own files in lmms/. Tasks
    are run one after the other; until all are done, the finished ones lie in OUT.unfinished. With
    --against, OUT holds both results, comparison.json and report.html.
    """
    shorthands: dict[str, object] = {
        "suite.name": suite,
        "suite.protocol": protocol,
        "suite.columns": _read_names(columns),
        "data_root": None if data is None else str(data),
        "tasks": _read_names(tasks),
        "batch_size": batch_size,
        "limit": limit,
        "limit_seed": limit_seed,
        "fewshot.shots": None if shots is None else _read_shots(shots),
        "fewshot.trials": trials,
        "judge.url": judge_url,
        "judge.model": judge_model,
        "backend": backend,
        "dtype": dtype,
        "device": device,
        "num_processes": num_processes,
    }
    settings = {key: value for key, value in shorthands.items() if value is not None}
    loaded = _load(recipe or _recipe_of(suite), settings, overrides or [])

    from kuea_mllm.devices import choose_device

    processes = loaded.num_processes
    if processes > 1 and not has_parent():
        refuse_two_launchers(processes)
    if launched_rank() == 0:
        # The others start while this one writes already.
        _require_startable(out, against, resume=resume, restart=restart)
    choose_device(loaded.device)
    if dry_run:
        from kuea_mllm.cli.evaluate_plan import print_dry_run

        print_dry_run(loaded, [m for m in (model, against) if m], mllm, json_output=json_output)
    elif processes > 1 and not has_parent():
        launch_processes(processes, out)
    else:
        from kuea_mllm.evaluation.answering.processes import leave_processes

        options: dict[str, Any] = {
            "mllm": mllm,
            "device": loaded.device,
            "show_progress": not json_output,
        }
        if against is None:
            result = _run(loaded, model, out, resume=resume, restart=restart, **options)
            _finish(result, out, json_output=json_output)
        else:
            pair = {"baseline": against, "candidate": model}
            _run_pair(loaded, pair, out, options, (resume, restart), json_output=json_output)
        leave_processes()


def _recipe_of(suite: str | None) -> str | None:
    """Return the shipped recipe of a suite: its columns, and what belongs to it besides."""
    from kuea_mllm.config.evaluate import SUITE_COLUMNS, nearest
    from kuea_mllm.errors import RecipeError

    if suite is None:
        return None
    if suite not in SUITE_COLUMNS:
        raise RecipeError(
            f"no suite is called {suite!r} ({nearest(suite, tuple(SUITE_COLUMNS))}).",
            "`kuea-mllm recipes list` names recipes of all kinds.",
        )
    return f"eval/{suite.replace('-', '_')}"


def _load(recipe: str | None, settings: Mapping[str, object], overrides: list[str]) -> EvalRecipe:
    from kuea_mllm.config.evaluate import EvalRecipe
    from kuea_mllm.config.recipes import apply_overrides, apply_settings, load_recipe
    from kuea_mllm.errors import RecipeError

    if recipe is not None:
        return load_recipe(recipe, EvalRecipe, settings=settings, overrides=overrides)
    if "tasks" not in settings:
        raise RecipeError("nothing to evaluate on.", "Pass --suite, --tasks or --recipe.")
    content = apply_settings({"kind": "eval"}, settings)
    content = apply_overrides(content, overrides)
    return EvalRecipe.parse(content, origin="of the command line")


def _require_startable(out: Path, against: Path | None, *, resume: bool, restart: bool) -> None:
    if against is None:
        from kuea_mllm.evaluation.unfinished import require_startable

        require_startable(out, resume=resume, restart=restart)
    else:
        from kuea_mllm.workflows.against import require_pair_startable

        require_pair_startable(out, resume=resume, restart=restart)


def _run(
    recipe: EvalRecipe,
    model: Path,
    out: Path,
    *,
    mllm: str | None,
    device: str,
    show_progress: bool,
    resume: bool,
    restart: bool,
    same_as: Path | None = None,
) -> dict[str, Any]:
    from kuea_mllm.config.recipes import recipe_to_yaml
    from kuea_mllm.evaluation.runner import evaluate as run_evaluation
    from kuea_mllm.manifest import current_command

    return run_evaluation(
        model,
        recipe.tasks,
        out,
        adapter=mllm,
        batch_size=recipe.batch_size,
        limit=recipe.limit,
        limit_seed=recipe.limit_seed,
        dtype=recipe.dtype,
        device=device,
        seed=recipe.seed,
        max_failures=recipe.max_failures,
        command=current_command(),
        show_progress=show_progress,
        recipe=recipe_to_yaml(recipe),
        suite=recipe.suite,
        fewshot=recipe.fewshot,
        data=recipe.data,
        data_root=recipe.data_root,
        judge=recipe.judge,
        backend=recipe.backend,
        backend_args=recipe.backend_args,
        shared_prefix=recipe.shared_prefix,
        resume=resume,
        restart=restart,
        same_as=same_as,
    )


def _run_pair(
    recipe: EvalRecipe,
    models: Mapping[str, Path],
    out: Path,
    options: Mapping[str, Any],
    ways: tuple[bool, bool],
    *,
    json_output: bool,
) -> None:
    from kuea_mllm.config.recipes import recipe_to_yaml
    from kuea_mllm.evaluation.answering.opening import choose_adapter
    from kuea_mllm.evaluation.plugin import MODEL_ID
    from kuea_mllm.workflows.against import BASELINE, REPORT, evaluate_pair

    for path in models.values() if recipe.backend == MODEL_ID else ():
        # Both, before the first of them is evaluated for hours.
        choose_adapter(path, options["mllm"]).check_base(path)

    def run(model: Path, folder: Path, going_on: bool) -> dict[str, Any]:
        first = folder.with_name(BASELINE)
        return _run(
            recipe,
            model,
            folder,
            resume=going_on,
            restart=False,
            same_as=first if folder != first else None,
            **options,
        )

    comparison = evaluate_pair(
        models,
        out,
        run,
        recipe=recipe_to_yaml(recipe),
        device=options["device"],
        resume=ways[0],
        restart=ways[1],
    )
    if comparison is None:
        return
    if json_output:
        print_json(comparison)
        return
    from kuea_mllm.reporting.tables import print_comparison

    print_comparison(comparison)
    typer.echo(f"report: {out / REPORT}")


def _finish(summary: dict[str, Any], out: Path, *, json_output: bool) -> None:
    if launched_rank() > 0:
        return
    from kuea_mllm.reporting.results_report import REPORT, write_results_report

    write_results_report(out / REPORT, out)
    if json_output:
        print_json(summary)
        return
    from kuea_mllm.reporting.tables import print_summary

    print_summary(summary)
    for line in _trial_lines(summary):
        typer.echo(line)
    typer.echo(f"results: {out}")
    typer.echo(f"report: {out / REPORT}")


def _read_names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _read_shots(text: str) -> list[int]:
    from kuea_mllm.errors import RecipeError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"--shots {text!r} is not a list of whole numbers.", "Write it like --shots 0,4,16."
        ) from None


def _trial_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return one line per data set and number of shots of a few-shot run."""
    lines = []
    for dataset, by_shots in summary.get("fewshot", {}).get("trials", {}).items():
        for shots, trials in by_shots.items():
            mean, spread = trials["mean"], trials["std"]
            score = "no score" if mean is None else f"{mean:.2f}"
            score += "" if spread is None else f" (std {spread:.2f})"
            count = len(trials["seeds"])
            noun = "trial" if count == 1 else "trials"
            lines.append(f"{dataset}, {shots} shots: {trials['metric']} {score}, {count} {noun}")
    return lines
