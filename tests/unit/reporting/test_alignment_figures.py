"""What the figures of an alignment run hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from alignment_samples import metric_rows
from matplotlib.figure import Figure

from kuea_mllm.reporting import alignment_figures as figures


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]


def test_every_logged_term_has_a_panel_known_ones_first() -> None:
    rows = [{**row, "loss_my_own": 1.0} if "loss" in row else row for row in metric_rows()]
    shown = titles(figures.loss_terms(rows))
    assert [title.removesuffix(" (log scale)") for title in shown] == [
        "total loss",
        "kernel gap",
        "preservation",
        "my own",
    ]


def test_term_that_starts_at_zero_still_gets_its_log_scale() -> None:
    rows = [{"step": step, "loss_preserve": 0.0 if step == 1 else 10.0**step} for step in range(9)]
    (axes,) = figures.loss_terms(rows[1:]).axes
    assert axes.get_yscale() == "log"
    assert len(axes.get_lines()[0].get_xdata()) == 7


def test_term_that_is_zero_often_stays_on_a_linear_scale() -> None:
    rows = [{"step": step, "loss_cka": 0.0 if step % 2 else 10.0**step} for step in range(9)]
    (axes,) = figures.loss_terms(rows).axes
    assert axes.get_yscale() == "linear"
    assert len(axes.get_lines()[0].get_xdata()) == 9


def test_gap_is_drawn_beside_that_of_the_original_under_the_same_kernel() -> None:
    figure = figures.heldout_gap(metric_rows())
    assert len(figure.axes[0].get_lines()) == 2
    assert titles(figure)[1:] == ["linear CKA with the teacher", "zero-shot accuracy"]


def test_small_changes_of_a_share_do_not_fill_the_panel() -> None:
    low, high = figures.heldout_gap(metric_rows()).axes[1].get_ylim()
    assert high - low == pytest.approx(0.1)


def test_drift_shows_distance_bound_cosine_and_patch_tokens() -> None:
    figure = figures.drift(metric_rows())
    assert [len(axes.get_lines()) for axes in figure.axes] == [1, 2, 2, 1]
    rows = [{k: v for k, v in row.items() if k != "heldout_patch_drift"} for row in metric_rows()]
    assert len(figures.drift(rows).axes) == 3


def test_rho_stands_first_among_the_constants() -> None:
    assert titles(figures.kernel_constants(metric_rows()))[0] == "rho = gamma / coef0"


def test_course_shows_what_was_logged() -> None:
    assert len(figures.training_course(metric_rows()).axes) == 3
    rows = [{**row, "mfu": 0.4} for row in metric_rows()]
    assert titles(figures.training_course(rows))[-1] == "share of peak FLOP/s"


@pytest.mark.parametrize("count", range(1, 10))
def test_every_panel_stands_over_numbered_steps(count: int) -> None:
    rows = [{"step": s, **{f"loss_{n}": 1.0 + s for n in range(count)}} for s in range(3)]
    figure = figures.loss_terms(rows)
    assert len(figure.axes) == count
    figure.draw_without_rendering()
    lowest: dict[float, Any] = {}
    for axes in figure.axes:
        box = axes.get_position()
        known = lowest.get(round(box.x0, 1))
        if known is None or box.y0 < known.get_position().y0:
            lowest[round(box.x0, 1)] = axes
    assert all(axes.get_xlabel() == "step" for axes in lowest.values())


@pytest.mark.parametrize(
    "draw",
    [
        figures.loss_terms,
        figures.kernel_constants,
        figures.training_course,
        figures.heldout_gap,
        figures.drift,
    ],
)
def test_empty_metrics_are_said_to_be_empty(draw: Callable[[Any], Figure]) -> None:
    (axes,) = draw([]).axes
    assert [text.get_text() for text in axes.texts] == ["no values were logged"]


def test_differences_share_one_scale_around_zero() -> None:
    teacher = np.eye(4)
    figure = figures.kernel_differences(
        {"original": teacher + 0.5, "aligned": teacher + 0.1, "teacher": teacher}
    )
    images = [image for axes in figure.axes[:3] for image in axes.get_images()]
    assert {image.get_clim() for image in images} == {(-0.5, 0.5)}
    assert [title.splitlines()[1] for title in titles(figure)[:3]] == [
        "mean size 0.500",
        "mean size 0.100",
        "mean size 0.400",
    ]


def test_differences_need_all_three_of_one_shape() -> None:
    with pytest.raises(ValueError, match="original, aligned and teacher"):
        figures.kernel_differences({"teacher": np.eye(3)})
    with pytest.raises(ValueError, match="one common shape"):
        figures.kernel_differences(
            {"original": np.eye(3), "aligned": np.eye(3), "teacher": np.eye(4)}
        )


def attention(count: int, side: int = 8, grid: int = 4) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        random.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        random.random((count, grid, grid)),
        random.random((count, grid, grid)),
    ]


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_attention_shows_image_original_and_aligned_of_each_picture(count: int) -> None:
    figure = figures.attention_maps(*attention(count))
    assert len(figure.axes) == 3 * count
    named = [title for title in titles(figure) if title]
    assert named == ["image", "original", "aligned"] * (2 if count > 3 else 1)


def test_attention_maps_of_a_picture_share_their_scale() -> None:
    images = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    strong, weak = np.zeros((1, 2, 2)), np.zeros((1, 2, 2))
    strong[0, 0, 0], weak[0, 0, 0] = 1.0, 0.5
    _, original, aligned = figures.attention_maps(images, strong, weak).axes
    bright, dim = (axes.get_images()[0].get_array() for axes in (original, aligned))
    assert bright[0, 0].sum() > dim[0, 0].sum() > dim[7, 7].sum()
    assert (bright[7, 7] == dim[7, 7]).all()


def test_attention_of_odd_sizes_covers_the_picture() -> None:
    figure = figures.attention_maps(*attention(1, side=14, grid=3))
    assert all(axes.get_images()[0].get_array().shape[:2] == (14, 14) for axes in figure.axes)


def test_attention_of_other_shapes_is_refused() -> None:
    images, original, aligned = attention(2)
    with pytest.raises(ValueError, match="do not fit 2 images"):
        figures.attention_maps(images, original, aligned[:1])
    with pytest.raises(ValueError, match="cannot be drawn"):
        figures.attention_maps(images[..., 0], original, aligned)
