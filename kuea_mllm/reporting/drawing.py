"""How all figures look, and how they are written.

Figures are made without pyplot, so nothing is shared between them and no display is needed. All
have a white background and colours that colour-blind readers can tell apart (Okabe and Ito).
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from kuea_mllm.errors import UserError
from kuea_mllm.io import disk_errors_named

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#595959"
_LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))
_COLOURS = (GREY, BLUE, ORANGE, GREEN, PURPLE)
_STROKES = ("-", "-", "--", "-.", ":")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_HATCHES = ("", "", "///", "...", "xx", "\\\\\\", "ooo", "++")
# Any: newer matplotlib types the keys one by one.
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.unicode_minus": False,
    "axes.facecolor": "white",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.08,
    "legend.frameon": False,
    "text.parse_math": False,
    # Outlines instead of text: the same look everywhere, whatever fonts are installed.
    "svg.fonttype": "path",
    "svg.hashsalt": "kuea-mllm",
}
Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Look:
    """How one of several models is drawn: what tells it apart without colours too.

    Args:
        colour: Of lines, points and bars.
        line: Style of lines.
        marker: Of points.
        hatch: Of bars.
    """

    colour: str
    line: str
    marker: str
    hatch: str


def choose_look(index: int) -> Look:
    """Return the look of a model by its place; the first one, a baseline, is grey."""
    colour = index % len(_COLOURS)
    return Look(
        _COLOURS[colour],
        _STROKES[colour],
        _MARKERS[index % len(_MARKERS)],
        _HATCHES[index % len(_HATCHES)],
    )


def figure_svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG text.

    The same figure always gives the same text, and figures of different names share no id, so that
    several can stand in one HTML page.

    Args:
        figure: The figure.
        name: Letters, digits and hyphens.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise ValueError(f"the figure name {name!r} is not made of letters, digits and hyphens.")
    buffer = io.StringIO()
    with drawing_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r'(\sid=")', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg[svg.index("<svg") :]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the ending of `path`.

    Raises:
        UserError: If the ending is another one.
    """
    path = Path(path)
    with disk_errors_named(path):
        if path.suffix == ".svg":
            name = re.sub(r"[^A-Za-z0-9]+", "-", f"figure-{path.stem}")
            path.write_text(figure_svg(figure, name), encoding="utf-8")
        elif path.suffix == ".png":
            with drawing_style():
                figure.savefig(path, format="png", dpi=160, metadata={"Software": None})
        else:
            raise UserError(f"figure {path} must end in .png or .svg.")


@contextmanager
def drawing_style() -> Iterator[None]:
    """Give everything drawn or written in the block the same look."""
    # rc_context puts back what a caller's notebook had set.
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Names of tasks may hold characters that the font lacks; a box is drawn instead.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def make_panels(count: int) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels one above the other over the same steps."""
    figure = Figure(figsize=(6.4, 3.4 if count == 1 else 2.3 * count), layout="constrained")
    panels = list(np.atleast_1d(figure.subplots(count, 1, sharex=True)))
    for axes in panels:
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return figure, panels


def read_series(rows: Sequence[Row], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps and the finite values of one key; rows without it are skipped."""
    pairs = [
        (float(row["step"]), float(row[key]))
        for row in rows
        if row.get("step") is not None and row.get(key) is not None
    ]
    finite = [pair for pair in pairs if math.isfinite(pair[1])]
    array = np.asarray(finite, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def draw_lines(
    axes: Axes,
    rows: Sequence[Row],
    names: Mapping[str, str],
    *,
    with_legend: bool = True,
    marker: str | None = None,
) -> list[NDArray[np.float64]]:
    """Draw one line for each key that was logged.

    Args:
        axes: Where to draw.
        rows: Logged rows, each with its `step`.
        names: Label of each key.
        with_legend: Whether to name the lines.
        marker: Marker of the points, left out where they would crowd.

    Returns:
        The values of each line that was drawn.
    """
    curves = []
    for index, (key, label) in enumerate(names.items()):
        steps, values = read_series(rows, key)
        if not steps.size:
            continue
        colour, line = _LINES[index % len(_LINES)]
        dot = "o" if steps.size == 1 else (marker if steps.size <= 40 else None)
        axes.plot(steps, values, line, color=colour, linewidth=1.7, marker=dot, ms=4, label=label)
        curves.append(values)
    if not curves:
        say_empty(axes)
    elif with_legend:
        # Above the panel, where it cannot hide a line.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=2.8)
    return curves


def say_empty(axes: Axes, message: str = "no values were logged") -> None:
    """Write into an empty panel why it is empty."""
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", color=GREY)


def spans_decades(curves: Sequence[NDArray[np.float64]]) -> bool:
    """Tell whether curves are positive and so far apart that a log scale shows more."""
    if not curves:
        return False
    values = np.concatenate(curves)
    return bool(values.min() > 0 and values.max() / values.min() > 20)


def set_log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    # The formatter that matplotlib would choose writes TeX, which is off for the sake of names.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
