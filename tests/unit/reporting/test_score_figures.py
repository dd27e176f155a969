from __future__ import annotations

import pytest

from kuea_mllm.reporting.score_figures import (
    Differences,
    Series,
    candidate_differences,
    radar_columns,
    score_bars,
    score_radar,
)

NAMES = ["a", "b", "c", "d"]
MODELS = [Series("one", [50.0, 60.0, 70.0, None]), Series("two", [55.0, 58.0, 71.0, 1400.0])]


def test_bars_are_as_long_as_the_scores() -> None:
    (axes,) = score_bars(NAMES, MODELS).axes
    widths = sorted(bar.get_width() for bar in axes.patches)
    assert widths == [50, 55, 58, 60, 70, 71, 1400]


def test_radar_leaves_out_what_is_missing_or_no_share() -> None:
    assert radar_columns(NAMES, MODELS) == ["a", "b", "c"]
    (axes,) = score_radar(NAMES, MODELS).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [
        [50, 60, 70, 50],
        [55, 58, 71, 55],
    ]
    assert axes.get_ylim() == (0, 100)


def test_radar_of_two_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="2 can be drawn"):
        score_radar(NAMES[:2], [Series("one", [1.0, 2.0])])


def test_each_candidate_has_its_own_line_and_name() -> None:
    values = [(1.0, 0.5, 1.5), None]
    figure = candidate_differences(["a", "b"], [Differences("x", values), Differences("y", values)])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["x", "y"]
    (axes,) = figure.axes
    ends = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert ends.count((0.5, 1.5)) == 2
