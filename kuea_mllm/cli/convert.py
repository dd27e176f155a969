"""`kuea-mllm convert`: read a tower in any known format, write it in another, or just look."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, print_json, verb


class Format(StrEnum):
    """Formats that a tower can be written in."""

    HF = "hf"
    VISUAL = "visual"
    OPENAI = "openai"


@verb
def convert(
    source: Annotated[str, typer.Argument(help="HF directory, hub id or checkpoint file.")],
    destination: Annotated[
        Path | None,
        typer.Argument(
            help="Directory (hf) or file (visual, openai) to create.", show_default=False
        ),
    ] = None,
    to: Annotated[
        Format,
        typer.Option(
            help="hf: directory for from_pretrained; visual: open_clip visual state dict, as the "
            "KUEA authors release; openai: full OpenAI CLIP state dict, as DIVA releases."
        ),
    ] = Format.HF,
    text_from: Annotated[
        str | None,
        typer.Option(
            help="With --to openai: full CLIP whose text tower is taken (OpenAI or open_clip state "
            "dict, HF directory, hub id)."
        ),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="quick_gelu or gelu, for files that do not state it.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, for checkpoint files.")
    ] = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Only tell what SOURCE is; write nothing.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Convert a vision tower exactly: no tensor is rounded, none is guessed."""
    if inspect:
        _inspect(source, json_output)
        return
    if destination is None:
        raise typer.BadParameter("give DESTINATION, or --inspect to only look at SOURCE.")

    if (to is Format.OPENAI) != (text_from is not None):
        raise typer.BadParameter(
            "--to openai and --text-from FULL_CLIP go together: OpenAI's format holds both halves."
        )

    from kuea_mllm.io import atomic_directory, require_free_output
    from kuea_mllm.manifest import current_command, library_versions, utc_now
    from kuea_mllm.towers.load import load_tower
    from kuea_mllm.towers.save import save_tower, save_visual

    require_free_output(destination)
    tower = load_tower(source, activation=activation, heads=heads)
    if to is Format.VISUAL:
        save_visual(tower, destination)
    elif text_from is not None:
        from kuea_mllm.towers.openai_export import save_openai

        save_openai(tower, text_from, destination)
    else:
        manifest = {
            "kind": "tower",
            "base_tower": {
                "reference": source,
                "layout": tower.layout,
                "fingerprint": tower.fingerprint,
            },
            "versions": library_versions(),
            "command": current_command(),
            "created": utc_now(),
        }
        with atomic_directory(destination) as partial:
            save_tower(tower, partial, manifest=manifest)
    if json_output:
        print_json(
            {
                "destination": str(destination),
                "from": tower.layout,
                "to": to.value,
                "fingerprint": tower.fingerprint,
            }
        )
        return
    typer.echo(f"{source} ({tower.layout}) -> {destination} ({to.value})")
    typer.echo(f"tower {tower.fingerprint}")


def _inspect(source: str, json_output: bool) -> None:
    from kuea_mllm.towers.layouts import describe_checkpoint

    found = describe_checkpoint(source).to_dict()
    if json_output:
        print_json(found)
        return
    from kuea_mllm.reporting.tables import print_key_values

    print_key_values(source, {name.replace("_", " "): str(v) for name, v in found.items()})
