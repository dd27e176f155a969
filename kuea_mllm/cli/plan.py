"""`kuea-mllm plan`: memory, hours and disk of an alignment, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.common import Json, SetOption, print_json, verb

if TYPE_CHECKING:
    from kuea_mllm.planning.result import AlignmentPlan


@verb
def plan(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file.")
    ] = "align/vit_l_14",
    card: Annotated[
        str, typer.Option(help="rtx3090, rtx4090, l40s, a100-40, a100-80, h100 or h200.")
    ] = "rtx4090",
    processes: Annotated[int, typer.Option(min=1, help="Devices that share the batch.")] = 1,
    mfu: Annotated[float, typer.Option(help="Assumed share of the card's peak.")] = 0.5,
    images: Annotated[
        int, typer.Option(min=1, help="Images in the training set; ImageNet-1K by default.")
    ] = 1_281_167,
    images_per_core: Annotated[
        float, typer.Option(help="Assumed images/s of one decoding process.")
    ] = 100.0,
    overrides: SetOption = None,
    all_recipes: Annotated[
        bool, typer.Option("--all", help="All shipped recipes on their reference hardware.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Plan an alignment: memory per device by part, what would make it fit, hours, disk.

    Counts on tensors without data, so it needs no weights and no GPU. Models are known by name or
    by the config.json of a directory. With --all: the Markdown table of docs/recipes.md.
    """
    if all_recipes:
        from kuea_mllm.planning.text import recipes_markdown

        typer.echo(recipes_markdown(), nl=False)
        return
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe
    from kuea_mllm.planning.cards import find_card
    from kuea_mllm.planning.fitting import ways_to_fit
    from kuea_mllm.planning.plan import plan_alignment
    from kuea_mllm.planning.text import plan_text

    device = find_card(card)
    loaded = load_recipe(recipe, AlignRecipe, overrides=overrides or [])
    planned = plan_alignment(
        loaded,
        card=device,
        processes=processes,
        mfu=mfu,
        images=images,
        images_per_core=images_per_core,
    )
    alternatives = [] if planned.fits else ways_to_fit(loaded, card=device, processes=processes)
    if json_output:
        print_json(plan_json(planned) | {"fits_with": [vars(way) for way in alternatives]})
    else:
        typer.echo(plan_text(planned, alternatives))


def plan_json(planned: AlignmentPlan) -> dict[str, Any]:
    """Return a plan as JSON values."""
    return planned.to_dict()
