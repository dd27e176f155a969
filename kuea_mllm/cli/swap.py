"""`kuea-mllm swap`: put a tower into a multimodal LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, Out, print_json, verb


@verb
def swap(
    base: Annotated[Path, typer.Option(help="Directory of the MLLM; it is not changed.")],
    tower: Annotated[str, typer.Option(help="Tower: directory, hub id or checkpoint file.")],
    out: Out,
    mllm: Annotated[
        str | None, typer.Option(help="Adapter, e.g. llava; recognised from BASE if left out.")
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="quick_gelu or gelu, for checkpoint files.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, for checkpoint files.")
    ] = None,
    allow_same: Annotated[
        bool, typer.Option("--allow-same", help="Accept a tower that is already inside BASE.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Copy an MLLM with its vision tower replaced; only files with tower weights are rewritten.

    The result loads with plain `from_pretrained`; kuea.json inside records what was replaced.
    """
    from kuea_mllm.adapters.registry import adapter_for, get_adapter
    from kuea_mllm.io import require_free_output
    from kuea_mllm.manifest import current_command
    from kuea_mllm.swapping import swap_tower_files
    from kuea_mllm.towers.load import load_tower

    require_free_output(out)
    adapter = get_adapter(mllm) if mllm else adapter_for(base)
    adapter.check_base(base)
    receipt = swap_tower_files(
        base,
        load_tower(tower, activation=activation, heads=heads),
        out,
        adapter=adapter,
        command=current_command(),
        allow_same=allow_same,
    )
    if json_output:
        import dataclasses

        print_json({"directory": str(out), **dataclasses.asdict(receipt)})
        return
    from kuea_mllm.reporting.tables import print_key_values

    print_key_values(
        f"swapped into {out}",
        {
            "adapter": receipt.adapter,
            "tower before": receipt.fingerprint_before,
            "tower now": receipt.fingerprint_after,
            "tensors replaced": str(receipt.tensors_replaced),
            "files rewritten": ", ".join(receipt.files_rewritten),
            "files linked": ", ".join(receipt.files_linked),
            "dtype": receipt.dtype,
            "seconds": f"{receipt.seconds:.1f}",
        },
    )
