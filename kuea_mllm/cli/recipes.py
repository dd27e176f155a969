"""`kuea-mllm recipes`: list, show, copy, validate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, print_json, verb

app = typer.Typer(help="List, show, copy and validate recipes.", no_args_is_help=True)


@app.command("list")
@verb
def list_recipes(
    kind: Annotated[str | None, typer.Argument(help="align, eval or sweep; default all.")] = None,
    json_output: Json = False,
) -> None:
    """List the shipped recipes."""
    from kuea_mllm.config.recipes import SCHEMAS, list_shipped
    from kuea_mllm.errors import UserError

    if kind is not None and kind not in SCHEMAS:
        raise UserError(f"no recipes of kind '{kind}'; kinds are {', '.join(SCHEMAS)}.")
    shipped = list_shipped(kind)
    if json_output:
        print_json([{"name": recipe.name, "purpose": recipe.purpose} for recipe in shipped])
        return
    width = max(len(recipe.name) for recipe in shipped)
    for recipe in shipped:
        typer.echo(f"{recipe.name:<{width}}  {recipe.purpose}")


@app.command()
@verb
def show(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a recipe with its comments."""
    from kuea_mllm.config.recipes import find_recipe

    typer.echo(find_recipe(name).text, nl=False)


@app.command()
@verb
def copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    file: Annotated[Path, typer.Argument(help="File to create.")],
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from kuea_mllm.config.recipes import find_recipe
    from kuea_mllm.io import require_free_output

    recipe = find_recipe(name)
    require_free_output(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe.text, encoding="utf-8")
    typer.echo(f"{recipe.name} -> {file}")


@app.command()
@verb
def validate(
    files: Annotated[list[Path], typer.Argument(help="Recipe files.")],
) -> None:
    """Check recipe files against their schema."""
    from kuea_mllm.config.recipes import validate_file
    from kuea_mllm.errors import RecipeError

    for file in files:
        if not file.is_file():
            raise RecipeError(f"recipe file {file} does not exist.")
        recipe = validate_file(file)
        typer.echo(f"{file}: valid {type(recipe).__name__}")
