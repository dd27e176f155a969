"""Figures of runs and comparisons.

Each function takes plain data and returns a matplotlib figure for `save_figure` or `figure_svg`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from kuea_mllm.reporting.drawing import (
    BLUE,
    GREY,
    ORANGE,
    drawing_style,
    figure_svg,
    save_figure,
    say_empty,
)
from kuea_mllm.reporting.text import short_name
from kuea_mllm.reporting.view import parse_comparison

__all__ = [
    "figure_svg",
    "kernel_matrices",
    "paired_differences",
    "save_figure",
]

MAX_KERNEL_ITEMS = 256
_VERDICT_LOOK = {
    "better": (BLUE, "^", True),
    "worse": (ORANGE, "v", True),
    "cannot tell": (GREY, "o", False),
}


def kernel_matrices(
    matrices: Mapping[str, ArrayLike], labels: Sequence[str] | None = None
) -> Figure:
    """Draw kernel matrices over the same images side by side, on one scale.

    The scale covers the values off the diagonal, since the diagonal says nothing (an image is
    always like itself). If one matrix is named `teacher`, the others tell their distance to it.

    Args:
        matrices: Square matrices of one size, in the order to draw them.
        labels: Group of each image; images of a group should be neighbours.

    Raises:
        ValueError: If the matrices are not square and of one size, or the labels do not fit.
    """
    arrays = _checked_matrices(matrices, labels)
    size = next(iter(arrays.values())).shape[0]
    shown = min(size, MAX_KERNEL_ITEMS)
    low, high = _shared_scale(list(arrays.values()))
    with drawing_style():
        figure = Figure(figsize=(3.0 * len(arrays) + 0.9, 4.0), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(arrays)))
        for axes, (name, array) in zip(panels, arrays.items(), strict=True):
            picture = axes.imshow(
                array[:shown, :shown],
                vmin=low,
                vmax=high,
                cmap="viridis",
                interpolation="none",
                aspect="equal",
            )
            axes.set_title(short_name(name) + _gap_text(name, arrays))
            axes.set_xlabel("image" if shown == size else f"image (first {shown} of {size})")
            axes.spines[:].set_visible(False)
            _label_groups(axes, labels[:shown] if labels else None, with_names=axes is panels[0])
        bar = figure.colorbar(picture, ax=list(panels), extend="max", shrink=0.8, pad=0.02)
        bar.set_label("similarity")
    return figure


def paired_differences(comparison: Mapping[str, Any]) -> Figure:
    """Draw each column's difference with its interval, and a line where there is none.

    Args:
        comparison: The comparison's JSON form.
    """
    view = parse_comparison(comparison)
    rows = [row for row in view.rows if row.has_interval]
    with drawing_style():
        figure = Figure(figsize=(7.2, 1.5 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots()
        if not rows:
            say_empty(axes, "no column is paired")
            return figure
        axes.axvline(0, color="black", linewidth=1)
        for position, row in enumerate(rows):
            colour, marker, is_filled = _VERDICT_LOOK[row.verdict]
            low, high = 100 * (row.low or 0.0), 100 * (row.high or 0.0)
            axes.plot([low, high], [position] * 2, color=colour, linewidth=2)
            axes.plot(
                [100 * (row.difference or 0.0)],
                [position],
                marker=marker,
                markersize=8,
                color=colour,
                markerfacecolor=colour if is_filled else "white",
                markeredgewidth=1.8,
            )
            axes.annotate(
                row.difference_text,
                (1.02, position),
                xycoords=("axes fraction", "data"),
                va="center",
                annotation_clip=False,
            )
        averages = sum(row in view.averages for row in rows)
        if 0 < averages < len(rows):
            axes.axhline(len(rows) - averages - 0.5, color=GREY, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [short_name(row.task) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"candidate minus baseline, percentage points ({view.level_text} interval)")
        _add_verdict_legend(figure, {row.verdict for row in rows})
    return figure


def _checked_matrices(
    matrices: Mapping[str, ArrayLike], labels: Sequence[str] | None
) -> dict[str, NDArray[np.float64]]:
    arrays = {name: np.asarray(matrix, dtype=np.float64) for name, matrix in matrices.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1:
        raise ValueError(f"kernel matrices need one common shape, found {sorted(shapes)}.")
    shape = shapes.pop()
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2:
        raise ValueError(f"a kernel matrix must be square with two rows or more, found {shape}.")
    if labels is not None and len(labels) != shape[0]:
        raise ValueError(f"{len(labels)} labels do not fit kernel matrices of {shape[0]} images.")
    return arrays


def _shared_scale(arrays: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    off_diagonal = ~np.eye(arrays[0].shape[0], dtype=bool)
    values = np.concatenate([array[off_diagonal] for array in arrays])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _gap_text(name: str, arrays: Mapping[str, NDArray[np.float64]]) -> str:
    teacher = arrays.get("teacher")
    if teacher is None or name == "teacher":
        return "\n"
    off_diagonal = ~np.eye(teacher.shape[0], dtype=bool)
    gap = float(np.nanmean(np.abs(arrays[name] - teacher)[off_diagonal]))
    return f"\nmean gap to teacher {gap:.3f}"


def _label_groups(axes: Axes, labels: Sequence[str] | None, *, with_names: bool) -> None:
    axes.set_yticks([])
    if labels is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        return
    axes.set_xticks([])
    starts = [i for i, label in enumerate(labels) if i == 0 or labels[i - 1] != label]
    ends = [*starts[1:], len(labels)]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=0.6)
        axes.axvline(start - 0.5, color="white", linewidth=0.6)
    # More names than this would overlap.
    if with_names and len(starts) <= 16:
        middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
        axes.set_yticks(middles, [short_name(labels[start]) for start in starts])
        axes.tick_params(axis="y", length=0)


def _add_verdict_legend(figure: Figure, verdicts: set[str]) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            markerfacecolor=colour if is_filled else "white",
            markeredgewidth=1.8,
            label=verdict,
        )
        for verdict, (colour, marker, is_filled) in _VERDICT_LOOK.items()
        if verdict in verdicts
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
