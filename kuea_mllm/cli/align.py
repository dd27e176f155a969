"""`kuea-mllm align`: fine-tune a tower towards a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kuea_mllm.cli.common import DryRun, Json, Out, SetOption, print_json, verb

if TYPE_CHECKING:
    from kuea_mllm.config.align import AlignRecipe


@verb
def align(
    out: Out,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file.")
    ] = "align/vit_l_14",
    student: Annotated[
        str | None, typer.Option(help="Tower: HF directory, hub id or checkpoint file.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Vision model: HF directory or hub id.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder of training images.")] = None,
    heldout: Annotated[
        str | None, typer.Option(help="Folder of images to measure the kernel gap on.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser updates.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in one kernel matrix.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    activation: Annotated[
        str | None, typer.Option(help="quick_gelu or gelu, for checkpoint files.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, for checkpoint files.")
    ] = None,
    overrides: SetOption = None,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Align a CLIP-family tower with a vision teacher by matching kernel matrices.

    Writes OUT/tower (a plain Hugging Face tower directory), OUT/run.yaml, metrics.jsonl, figures.
    """
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe

    shorthands = {
        "student.model": student,
        "student.activation": activation,
        "student.heads": heads,
        "teacher.model": teacher,
        "data.images": images,
        "data.heldout": heldout,
        "optim.steps": steps,
        "optim.batch_size": batch_size,
        "runtime.seed": seed,
        "runtime.device": device,
    }
    settings: dict[str, object] = {k: v for k, v in shorthands.items() if v is not None}
    if steps is not None:
        settings["optim.epochs"] = None
    loaded = load_recipe(recipe, AlignRecipe, settings=settings, overrides=overrides or [])
    if dry_run:
        _print_plan(loaded, json_output)
        return

    from kuea_mllm.alignment.run import run_alignment
    from kuea_mllm.reporting.alignment import draw_alignment_figures, print_alignment_result

    result = run_alignment(loaded, out, progress=not json_output, finish=draw_alignment_figures)
    if json_output:
        print_json(
            {
                "directory": str(result.directory),
                "tower": str(result.tower),
                "before": result.before,
                "after": result.after,
                "seconds": round(result.seconds, 1),
            }
        )
    else:
        print_alignment_result(
            str(result.directory), before=result.before, after=result.after, seconds=result.seconds
        )


def _print_plan(recipe: AlignRecipe, json_output: bool) -> None:
    from kuea_mllm.alignment.inputs import open_inputs
    from kuea_mllm.config.recipes import recipe_to_yaml

    inputs = open_inputs(recipe)
    if json_output:
        print_json(
            {"recipe": inputs.recipe.model_dump(mode="json"), "images": len(inputs.training)}
        )
        return
    typer.echo(recipe_to_yaml(inputs.recipe), nl=False)
    typer.secho(f"# {len(inputs.training)} training images; nothing was run (--dry-run).", dim=True)
