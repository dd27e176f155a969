"""`kuea-mllm verify`: which tower is in a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Activation, Heads, Json, print_json, verb


@verb
def verify(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that `swap` wrote.")],
    tower: Annotated[
        str | None,
        typer.Option(help="The tower that should be inside: directory, hub id, checkpoint file."),
    ] = None,
    mllm: Annotated[
        str | None, typer.Option(help="Adapter; taken from kuea.json or recognised if left out.")
    ] = None,
    activation: Activation = None,
    heads: Heads = None,
    json_output: Json = False,
) -> None:
    """Recompute the fingerprint of the tower inside a model and say which tower that is.

    Exit code 0 if DIR is what its kuea.json says (and holds TOWER, if given), 2 if not.
    """
    from kuea_mllm.adapters.registry import get_adapter
    from kuea_mllm.swapping.sources import load_any_tower
    from kuea_mllm.swapping.verify import verify_model

    found = verify_model(
        model,
        tower=None if tower is None else load_any_tower(tower, activation=activation, heads=heads),
        adapter=None if mllm is None else get_adapter(mllm),
    )
    if json_output:
        print_json(found.to_dict())
    else:
        from kuea_mllm.reporting.tables import print_key_values

        print_key_values(
            str(model),
            {
                "vision tower": found.tower,
                "fingerprint": found.fingerprint or "not on this machine",
                "dtype": found.dtype or "-",
                "adapter": found.adapter,
                "verdict": "as recorded" if found.is_good else "NOT what it should be",
            },
        )
        for problem in found.problems:
            typer.secho("problem: ", fg=typer.colors.RED, bold=True, nl=False)
            typer.echo(problem)
    if not found.is_good:
        raise typer.Exit(2)
