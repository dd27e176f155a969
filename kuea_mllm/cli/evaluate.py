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

if TYPE_CHECKING:
    from kuea_mllm.config.evaluate import EvalRecipe


@verb
def evaluate(
    model: Annotated[Path, typer.Option(help="Directory of the MLLM.")],
    out: Out,
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
    limit: Annotated[int | None, typer.Option(help="First N documents of each task.")] = None,
    shots: Annotated[
        str | None, typer.Option(help="Few-shot: comma-separated numbers of demonstrations.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Few-shot: number of seeds.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    overrides: SetOption = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    restart: Restart = False,
    json_output: Json = False,
) -> None:
    """Answer the questions of benchmarks and let lmms-eval score them.

    Writes OUT/summary.json, OUT/samples/*.jsonl and lmms-eval's own files in OUT/lmms. Few-shot
    recipes (openflamingo3b_fewshot) take the folder of each data set: --set data.coco=DIR. Tasks
    are run one after the other; until all are done, the finished ones lie in OUT.unfinished.
    """
    from kuea_mllm.config.evaluate import EvalRecipe
    from kuea_mllm.config.recipes import (
        apply_overrides,
        apply_settings,
        load_recipe,
        recipe_to_yaml,
    )
    from kuea_mllm.errors import RecipeError

    shorthands = {"batch_size": batch_size, "limit": limit, "dtype": dtype, "device": device}
    settings: dict[str, object] = {k: v for k, v in shorthands.items() if v is not None}
    if tasks is not None:
        settings["tasks"] = [name.strip() for name in tasks.split(",") if name.strip()]
    if shots is not None:
        settings["fewshot.shots"] = _read_shots(shots)
    if trials is not None:
        settings["fewshot.trials"] = trials
    if recipe is not None:
        loaded = load_recipe(recipe, EvalRecipe, settings=settings, overrides=overrides or [])
    elif tasks is not None:
        content = apply_settings({"kind": "eval"}, settings)
        content = apply_overrides(content, overrides or [])
        loaded = EvalRecipe.parse(content, origin="of the command line")
    else:
        raise RecipeError("nothing to evaluate on.", "Pass --tasks or --recipe.")

    from kuea_mllm.devices import choose_device
    from kuea_mllm.evaluation.unfinished import require_startable

    require_startable(out, resume=resume, restart=restart)
    device = choose_device(loaded.device)
    if dry_run:
        _require_inputs(loaded, model, mllm)
        if json_output:
            print_json(loaded.model_dump(mode="json"))
        else:
            typer.echo(recipe_to_yaml(loaded), nl=False)
        return

    from kuea_mllm.evaluation.runner import evaluate as run_evaluation
    from kuea_mllm.manifest import current_command

    summary = run_evaluation(
        model,
        loaded.tasks,
        out,
        adapter=mllm,
        batch_size=loaded.batch_size,
        limit=loaded.limit,
        dtype=loaded.dtype,
        device=device,
        seed=loaded.seed,
        max_failures=loaded.max_failures,
        command=current_command(),
        show_progress=not json_output,
        recipe=recipe_to_yaml(loaded),
        fewshot=loaded.fewshot,
        data={str(name): folder for name, folder in loaded.data.items()},
        resume=resume,
        restart=restart,
    )
    if json_output:
        print_json(summary)
        return
    from kuea_mllm.reporting.tables import print_summary

    print_summary(summary)
    for line in _trial_lines(summary):
        typer.echo(line)
    typer.echo(f"results: {out}")


def _require_inputs(recipe: EvalRecipe, model: Path, mllm: str | None) -> None:
    """Look for model, tasks and data without loading any of them."""
    from kuea_mllm.evaluation.fewshot.task_files import require_inputs
    from kuea_mllm.evaluation.opening import choose_adapter
    from kuea_mllm.evaluation.tasks import resolve_tasks

    choose_adapter(model, mllm).check_base(model)
    if recipe.tasks:
        resolve_tasks(recipe.tasks)
    if recipe.fewshot is not None:
        require_inputs(recipe.fewshot, {str(name): folder for name, folder in recipe.data.items()})


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
