"""The table and the figure of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kuea_mllm.reporting.drawing import GREY, choose_look, drawing_style, save_figure

_PANELS = (
    ("heldout_kernel_gap", "gap to the teacher's kernel"),
    ("heldout_cka_teacher", "CKA with the teacher"),
    ("heldout_drift_bound_mean", "bound on the change of a\ntext similarity (Prop. 3.2)"),
    ("heldout_patch_drift", "relative drift of\npatch tokens"),
    ("heldout_zero_shot", "zero-shot accuracy"),
)


def sweep_figure(record: Mapping[str, Any]) -> Figure:
    """Draw each measurement over the first key of the grid, one line for each of the other values.

    Args:
        record: Content of `sweep.json`.
    """
    rows = [row for row in record["runs"] if row["error"] is None]
    shown = [panel for panel in _PANELS if any(panel[0] in row["after"] for row in rows)]
    shown = shown or list(_PANELS[:1])
    with drawing_style():
        figure = Figure(figsize=(7.2, 2.4 * len(shown)), layout="constrained")
        grid: Any = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
        panels: list[Axes] = list(grid[:, 0])
        for axes, (name, label) in zip(panels, shown, strict=True):
            _draw(axes, rows, record["grid"], name)
            axes.set_ylabel(label)
        key = next(iter(record["grid"]))
        panels[-1].set_xlabel(key)
        if len(record["grid"]) > 1:
            panels[0].legend(title=", ".join(list(record["grid"])[1:]), fontsize="small")
    return figure


def draw_sweep(record: Mapping[str, Any], path: Path) -> None:
    """Write the figure of a sweep."""
    save_figure(sweep_figure(record), path)


def print_sweep(record: Mapping[str, Any]) -> None:
    """Print the table of a sweep."""
    from rich.console import Console
    from rich.table import Table

    names = [name for name, _ in _PANELS if any(name in row["after"] for row in record["runs"])]
    table = Table(title=f"{record['recipe']}: held-out measurements after training")
    table.add_column("run")
    for name in names:
        table.add_column(name.removeprefix("heldout_").replace("_", " "), justify="right")
    for row in record["runs"]:
        if row["error"] is not None:
            table.add_row(row["name"], f"failed: {row['error'].splitlines()[0]}")
            continue
        table.add_row(
            row["name"],
            *(f"{row['after'][name]:.4g}" if name in row["after"] else "" for name in names),
        )
    Console().print(table)


def _draw(
    axes: Axes, rows: Sequence[Mapping[str, Any]], grid: Mapping[str, Sequence[Any]], name: str
) -> None:
    key, *others = grid
    values = list(grid[key])
    is_scale = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    positions = [float(v) for v in values] if is_scale else list(range(len(values)))
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if name not in row["after"]:
            continue
        label = ", ".join(str(row["changes"][other]) for other in others)
        place = positions[values.index(row["changes"][key])]
        groups.setdefault(label, []).append((place, row["after"][name]))
    for number, (label, points) in enumerate(groups.items()):
        x, y = np.array(sorted(points)).T
        # Grey is the original tower's.
        look = choose_look(number + 1)
        axes.plot(
            x, y, look.line, color=look.colour, marker=look.marker, label=label, linewidth=1.5
        )
    before = [row["before"][name] for row in rows if name in row["before"]]
    if before:
        axes.axhline(before[0], color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            "original tower",
            (1, before[0]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize="small",
            color=GREY,
        )
    positive = [p for p in positions if p > 0]
    if is_scale and len(positive) == len(positions) and max(positive) >= 20 * min(positive):
        axes.set_xscale("log")
    axes.set_xticks(positions, [_tick(value) for value in values])
    axes.minorticks_off()


def _tick(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(str(part) for part in value.values())
    return str(value)
