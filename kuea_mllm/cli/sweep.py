"""`kuea-mllm sweep`: one alignment recipe at every combination of some values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kuea_mllm.cli.common import DryRun, Json, SetOption, print_json, verb


@verb
def sweep(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the sweep; goes on there.")],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Shipped sweep (sweep/...), or an alignment recipe."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2,...",
            help="Values of one key, e.g. objective.kernel_weight=0.1,0.5,1; repeat for more keys.",
        ),
    ] = None,
    student: Annotated[str | None, typer.Option(help="As for align.")] = None,
    teacher: Annotated[str | None, typer.Option(help="As for align.")] = None,
    images: Annotated[str | None, typer.Option(help="As for align.")] = None,
    heldout: Annotated[str | None, typer.Option(help="As for align.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    overrides: SetOption = None,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Run an alignment at every combination of some values; one table and figure.

    Runs share the target cache. What is finished is not repeated, so the same command goes on after
    an interruption, and one with more values adds to the table.
    """
    from kuea_mllm.workflows.sweep import plan_sweep, run_sweep

    content = _read(recipe, grid or [])
    shorthands = {
        "student.model": student,
        "teacher.model": teacher,
        "data.images": images,
        "data.heldout": heldout,
        "runtime.device": device,
    }
    settings = {key: value for key, value in shorthands.items() if value is not None}
    runs = plan_sweep(content, out, settings=settings, overrides=overrides or [])
    if dry_run:
        if json_output:
            print_json({run.name: run.recipe.model_dump(mode="json") for run in runs})
            return
        for run in runs:
            typer.echo(run.name)
        typer.secho(f"# {len(runs)} runs of {content.recipe}; nothing was run.", dim=True)
        return

    from kuea_mllm.reporting.sweep import draw_sweep, print_sweep

    record = run_sweep(runs, out, sweep=content, progress=not json_output)
    draw_sweep(record, out / "sweep.png")
    if json_output:
        print_json(record)
    else:
        print_sweep(record)
        typer.echo(f"sweep: {out}")


def _read(recipe: str | None, grid: list[str]) -> Any:
    import yaml

    from kuea_mllm.config.recipes import find_recipe, read_yaml
    from kuea_mllm.config.sweep import SweepRecipe
    from kuea_mllm.errors import RecipeError

    values: dict[str, Any] = {}
    for text in grid:
        key, equals, listed = text.partition("=")
        if not equals or not listed:
            raise RecipeError(f"--grid {text} must look like key.path=value,value.")
        values[key.strip()] = yaml.safe_load(f"[{listed}]")
    found = find_recipe(recipe or "align/vit_l_14")
    content = read_yaml(found.path)
    if content.get("kind") != "sweep":
        content = {"kind": "sweep", "recipe": recipe or "align/vit_l_14"}
        if not values:
            raise RecipeError(
                f"{found.name} is an alignment recipe, and nothing is varied.",
                "Pass --grid key=value,value, or a recipe of kind sweep.",
            )
    content = {**content, "grid": {**content.get("grid", {}), **values}}
    return SweepRecipe.parse(content, origin=found.name)
