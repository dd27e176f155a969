"""What a conversion did, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_conversion(source: str, record: Mapping[str, Any]) -> None:
    """Print one conversion: what was written, what was changed on request, the comparison.

    Args:
        source: What was converted, as the user named it.
        record: JSON form of the conversion.
    """
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{source} ({record['from']}) -> {record['destination']} ({record['to']})", markup=False
    )
    console.print(f"tower {record['fingerprint']}, {record['dtype']}", markup=False)
    for name, change in record["changes"].items():
        console.print(_change_sentence(name, change), markup=False)
    for report in record["parity"]:
        console.print(
            f"{report['first']} against {report['second']}, {report['images']} probe images; the "
            f"same within a relative error of {report['bound']:g}:",
            markup=False,
        )
        console.print(parity_table(report))


def parity_table(report: Mapping[str, Any]) -> Table:
    """Return the comparison of two forms of one tower.

    Args:
        report: JSON form of the comparison; its rows are shown.
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("max abs", justify="right")
    table.add_column("relative L2", justify="right")
    for row in report["rows"]:
        table.add_row(row["quantity"], _number(row["max_abs"]), _number(row["relative_l2"]))
    return table


def _change_sentence(name: str, change: Mapping[str, Any]) -> str:
    if name == "interpolate":
        text = f"mixed: {change['weight']:g} of it, the rest {change['original']}"
    elif name == "image_size":
        text = (
            f"resized from {change['from']} to {change['to']} pixels: position embeddings "
            f"{change['position_embeddings']}"
        )
    else:
        text = f"cast from {change['from']} to {change['to']}"
        if change["largest_error"]:
            text += f": rounded by {change['largest_error']:.2g} at most ({change['tensor']})"
        else:
            text += ": exact, no value was rounded"
    if "embedding_cosine_mean" in change:
        text += (
            f"; embeddings moved by {change['embedding_relative_l2']:.2g} of their norm (cosine "
            f"{change['embedding_cosine_mean']:.5f}, {change['images']} probe images)"
        )
    return text + "."


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.1e}"
