from __future__ import annotations

import pytest

from kuea_mllm.reporting.score_figures import (
    Differences,
    Series,
    candidate_differences,
    radar_columns,
    score_bars,
    score_radar,
    split_columns,
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


@pytest.mark.parametrize(("columns", "models", "figures"), [(13, 2, 1), (24, 4, 3), (2, 60, 2)])
def test_long_figures_are_split_to_fit_a_page(columns: int, models: int, figures: int) -> None:
    slices = split_columns(columns, models)
    assert len(slices) == figures
    names = list(map(str, range(columns)))
    assert [name for part in slices for name in names[part]] == names
    heights = []
    for part in slices:
        series = [Series(str(n), [50.0] * len(names[part])) for n in range(models)]
        heights.append(score_bars(names[part], series).get_figheight())
    # A single column is never split, however many models there are.
    assert max(heights) < 9.5 or figures == columns


def test_figures_that_belong_together_share_a_scale() -> None:
    series = [Series("one", [50.0])]
    assert score_bars(["a"], series).axes[0].get_xlim() == (0, 100)
    assert score_bars(["a"], series, largest=120.0).axes[0].get_xlim()[1] > 120
    candidate = [Differences("x", [(1.0, 0.5, 1.5)])]
    low, high = candidate_differences(["a"], candidate, span=(-9.0, 3.0)).axes[0].get_xlim()
    assert low < -9 and high > 3


def test_models_differ_by_more_than_colour() -> None:
    (axes,) = score_bars(["a"], [Series(str(number), [50.0]) for number in range(8)]).axes
    looks = [(bar.get_hatch(), bar.get_facecolor()) for bar in axes.patches]
    assert len(set(looks)) == 8
    # Only the first two, which are grey and blue, are told apart by their lightness.
    assert len({hatch for hatch, _ in looks[1:]}) == 7
    (around,) = score_radar(NAMES[:3], [Series(str(n), [1.0] * 3) for n in range(8)]).axes
    assert len({line.get_marker() for line in around.lines}) == 8


def test_radar_of_many_columns_is_refused() -> None:
    names = list(map(str, range(17)))
    with pytest.raises(ValueError, match="17 can be drawn"):
        score_radar(names, [Series("one", [1.0] * 17)])
