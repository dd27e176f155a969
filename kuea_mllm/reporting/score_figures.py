"""Figures of scores: bars and a radar for several models, differences of several candidates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kuea_mllm.reporting.drawing import choose_look, drawing_style
from kuea_mllm.reporting.text import short_name

_PAGE = 7.5  # inches that lanes may take
LEAST_SPOKES = 3
MOST_SPOKES = 16
"""More names than this would overlap around the circle."""


@dataclass(frozen=True)
class Series:
    """One model in a figure.

    Args:
        name: How it is called.
        values: One per column, in percent; None where there is none.
    """

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Differences:
    """One candidate's differences to the baseline, in points, with their intervals.

    Args:
        name: The candidate.
        values: Difference, low, high per column; None where there is no interval.
    """

    name: str
    values: Sequence[tuple[float, float, float] | None]


def split_columns(columns: int, models: int) -> list[slice]:
    """Return the columns of each figure, so that every figure fits a printed page."""
    figures = min(columns, math.ceil(columns * _lane_height(models) / _PAGE))
    ends = [round(columns * number / figures) for number in range(figures + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def score_bars(
    columns: Sequence[str], models: Sequence[Series], *, largest: float = 100.0
) -> Figure:
    """Draw each model's score in each column as a bar from zero.

    Args:
        columns: Their names.
        models: Scores of each model.
        largest: Highest score of all figures that belong together, for their scale.
    """
    height = 0.8 / len(models)
    with drawing_style():
        figure, axes = _lanes(columns, len(models))
        for index, model in enumerate(models):
            places = np.arange(len(columns)) - 0.4 + height * (index + 0.5)
            known = [(p, v) for p, v in zip(places, model.values, strict=True) if v is not None]
            axes.barh(
                [place for place, _ in known],
                [value for _, value in known],
                height=0.9 * height,
                color=choose_look(index).colour,
                hatch=choose_look(index).hatch,
                edgecolor="white",
                linewidth=0,
                label=short_name(model.name),
            )
            for place, value in known:
                axes.annotate(
                    f"{value:.1f}",
                    (value, place),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                )
        axes.set_xlim(0, 100.0 if largest <= 100 else 1.08 * largest)
        axes.set_xlabel("score, percent")
        figure.legend(loc="outside upper center", ncols=min(len(models), 3))
    return figure


def score_radar(columns: Sequence[str], models: Sequence[Series]) -> Figure:
    """Draw the models' scores around a circle, from zero in the middle to the outer ring.

    Columns where a model has no score, or one above 100, are left out.

    Raises:
        ValueError: If fewer than three columns are left, or more than 16.
    """
    used = radar_columns(columns, models)
    if not LEAST_SPOKES <= len(used) <= MOST_SPOKES:
        raise ValueError(
            f"a radar needs {LEAST_SPOKES} to {MOST_SPOKES} columns, {len(used)} can be drawn."
        )
    places = [columns.index(name) for name in used]
    angles = [2 * math.pi * index / len(used) for index in range(len(used))]
    with drawing_style():
        figure = Figure(figsize=(6.4, 5.4), layout="constrained")
        axes = figure.add_subplot(projection="polar")
        for index, model in enumerate(models):
            look = choose_look(index)
            values = [model.values[place] or 0.0 for place in places]
            axes.plot(
                [*angles, angles[0]],
                [*values, values[0]],
                look.line,
                color=look.colour,
                marker=look.marker,
                markersize=4,
                linewidth=1.7,
                label=short_name(model.name),
            )
        axes.set_xticks(angles, [short_name(name, 16) for name in used])
        axes.set_ylim(0, 100)
        axes.set_yticks([25, 50, 75], ["25", "50", "75"], fontsize=8.5)
        # Between two spokes, where it hides no name.
        axes.set_rlabel_position(180 / len(used))  # type: ignore[attr-defined]
        # The zero direction is up, as on a clock.
        axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.spines["polar"].set_color("#dddddd")
        axes.tick_params(axis="x", pad=4)
        for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
            # Names stand beside the circle, not across it.
            side = math.sin(angle)
            label.set_horizontalalignment(
                "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            )
            label.set_verticalalignment("bottom" if math.cos(angle) > 0.5 else "center")
            if math.cos(angle) < -0.5:
                label.set_verticalalignment("top")
        figure.legend(loc="outside lower center", ncols=min(len(models), 3))
    return figure


def radar_columns(columns: Sequence[str], models: Sequence[Series]) -> list[str]:
    """Return the columns that a radar can show: those where every model has 0 to 100 percent."""
    return [
        name
        for place, name in enumerate(columns)
        if all((value := m.values[place]) is not None and 0 <= value <= 100 for m in models)
    ]


def candidate_differences(
    columns: Sequence[str],
    candidates: Sequence[Differences],
    *,
    span: tuple[float, float] | None = None,
) -> Figure:
    """Draw several candidates' differences to one baseline, column by column.

    Args:
        columns: Their names.
        candidates: Differences of each candidate.
        span: Lowest and highest end of all figures that belong together, for their scale.
    """
    step = 0.7 / len(candidates)
    with drawing_style():
        figure, axes = _lanes(columns, len(candidates))
        axes.axvline(0, color="black", linewidth=1)
        if span is not None:
            low, high = min(span[0], 0.0), max(span[1], 0.0)
            margin = 0.04 * (high - low) or 1.0
            axes.set_xlim(low - margin, high + margin)
        for index, candidate in enumerate(candidates):
            # The first look is the baseline's, which is the line.
            look = choose_look(index + 1)
            label: str | None = short_name(candidate.name)
            for place, value in enumerate(candidate.values):
                if value is None:
                    continue
                difference, low, high = value
                height = place - 0.35 + step * (index + 0.5)
                axes.plot([low, high], [height] * 2, color=look.colour, linewidth=1.8)
                axes.plot(
                    [difference],
                    [height],
                    color=look.colour,
                    marker=look.marker,
                    ls="",
                    ms=6,
                    label=label,
                )
                label = None
        for place in range(1, len(columns)):
            axes.axhline(place - 0.5, color="#dddddd", linewidth=0.7)
        axes.grid(axis="x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel("candidate minus baseline, percentage points")
        figure.legend(loc="outside upper center", ncols=min(len(candidates), 3))
    return figure


def _lane_height(models: int) -> float:
    return 0.16 + 0.17 * models  # inches


def _lanes(columns: Sequence[str], models: int) -> tuple[Figure, Axes]:
    """Make a figure with one lane for each column, the first one on top."""
    height = 1.2 + len(columns) * _lane_height(models)
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(columns)), [short_name(name) for name in columns])
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure, axes
