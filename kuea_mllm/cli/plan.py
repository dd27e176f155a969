"""`kuea-mllm plan`: memory, hours and disk of a run, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.common import Json, SetOption, print_json, verb

if TYPE_CHECKING:
    from kuea_mllm.cards import Card


@verb
def plan(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file, align or lora.")
    ] = "align/vit_l_14",
    card: Annotated[
        str,
        typer.Option(help="rtx3090, rtx4080, rtx4090, l40s, a100-40, a100-80, h100 or h200."),
    ] = "rtx4090",
    processes: Annotated[int, typer.Option(min=1, help="Devices that share the batch.")] = 1,
    mfu: Annotated[
        float | None,
        typer.Option(help="Assumed share of the card's peak; 0.5 for align, 0.4 for lora."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="align: images in the training set; ImageNet-1K by default."),
    ] = None,
    images_per_core: Annotated[
        float | None,
        typer.Option(help="align: assumed images/s of one decoding process; 100 by default."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="lora: records in the mixture; LLaVA's 665,298 by default."),
    ] = None,
    mean_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="lora: tokens of an average record, its image's included; by default an assumed "
            "300 and the image's.",
        ),
    ] = None,
    overrides: SetOption = None,
    all_recipes: Annotated[
        bool, typer.Option("--all", help="All shipped recipes on their reference hardware.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Plan an alignment or a tuning: memory per device by part, what would fit, hours, disk.

    Counts on tensors without data, so it needs no weights and no GPU. Models are known by name or
    by the config.json of a directory. With --all: the Markdown tables of docs/recipes.md.
    """
    if all_recipes:
        from kuea_mllm.planning.text import recipes_markdown
        from kuea_mllm.planning.tuning_text import tuning_recipes_markdown

        typer.echo(f"{recipes_markdown()}\n{tuning_recipes_markdown()}", nl=False)
        return
    from kuea_mllm.cards import find_card
    from kuea_mllm.config.recipes import kind_of

    device = find_card(card)
    kind = kind_of(recipe)
    if kind == "lora":
        _refuse("lora", images=images, images_per_core=images_per_core)
        values = {"mfu": mfu, "samples": samples, "mean_tokens": mean_tokens}
        _plan_tuning(recipe, device, processes, _given(values), overrides or [], json_output)
    else:
        _refuse("align", samples=samples, mean_tokens=mean_tokens)
        values = {"mfu": mfu, "images": images, "images_per_core": images_per_core}
        _plan_alignment(recipe, device, processes, _given(values), overrides or [], json_output)


def _plan_alignment(
    recipe: str,
    card: Card,
    processes: int,
    values: dict[str, Any],
    overrides: list[str],
    as_json: bool,
) -> None:
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe
    from kuea_mllm.planning.fitting import ways_to_fit
    from kuea_mllm.planning.plan import plan_alignment
    from kuea_mllm.planning.text import plan_text

    loaded = load_recipe(recipe, AlignRecipe, overrides=overrides)
    planned = plan_alignment(loaded, card=card, processes=processes, **values)
    alternatives = [] if planned.fits else ways_to_fit(loaded, card=card, processes=processes)
    if as_json:
        print_json(planned.to_dict() | {"fits_with": [vars(way) for way in alternatives]})
    else:
        typer.echo(plan_text(planned, alternatives))


def _plan_tuning(
    recipe: str,
    card: Card,
    processes: int,
    values: dict[str, Any],
    overrides: list[str],
    as_json: bool,
) -> None:
    from kuea_mllm.config.lora import LoraRecipe
    from kuea_mllm.config.recipes import load_recipe
    from kuea_mllm.planning.tuning import plan_tuning
    from kuea_mllm.planning.tuning_text import tuning_plan_text

    loaded = load_recipe(recipe, LoraRecipe, overrides=overrides)
    planned = plan_tuning(loaded, card=card, processes=processes, **values)
    if as_json:
        print_json(planned.to_dict())
    else:
        typer.echo(tuning_plan_text(planned))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse(kind: str, **values: object) -> None:
    from kuea_mllm.errors import UserError

    for name, value in values.items():
        if value is not None:
            raise UserError(
                f"option --{name.replace('_', '-')} says nothing about a recipe of kind '{kind}'."
            )
