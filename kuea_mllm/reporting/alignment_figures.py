"""Figures of one alignment run.

Each function takes plain data and returns a matplotlib figure; see `drawing` for how all of them
look. Kernel matrices side by side are in `figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from kuea_mllm.reporting.drawing import (
    Row,
    draw_lines,
    drawing_style,
    read_series,
    say_empty,
    set_log_scale,
    spans_decades,
)

__all__ = [
    "attention_maps",
    "drift",
    "heldout_gap",
    "kernel_constants",
    "kernel_differences",
    "loss_terms",
    "training_course",
]

_TERM_LABELS = {
    "loss": "total loss",
    "loss_kernel": "kernel gap",
    "loss_feature": "feature gap",
    "loss_cka": "1 - CKA",
    "loss_distill": "distillation",
    "loss_preserve": "preservation",
    "loss_patch_preserve": "patch preservation",
    "loss_patch_kernel": "patch kernel gap",
    "loss_patch_distill": "patch distillation",
}
_CONSTANT_LABELS = {
    "kernel_rho": "rho = gamma / coef0",
    "kernel_gamma": "scale gamma",
    "kernel_coef0": "offset coef0",
    "kernel_sigma": "bandwidth sigma",
}
_COURSE_LABELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
    "samples_per_second": "samples per second",
    "rows_per_second": "rows per second",
    "mfu": "share of peak FLOP/s",
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what it is called and the lines in it.

    Args:
        title: Stands above the panel.
        lines: Label of each logged key.
        from_zero: Whether the axis starts at zero, as for shares and distances.
        least_span: What the axis spans at least, so that noise does not fill the panel.
    """

    title: str
    lines: Mapping[str, str]
    from_zero: bool = False
    least_span: float = 0.0


def loss_terms(rows: Sequence[Row]) -> Figure:
    """Draw the total loss and every term before weighting, each on its own scale.

    The terms differ by orders of magnitude, so that on one scale most would be flat lines.
    """
    return _draw_panels(_single_panels(rows, "loss", _TERM_LABELS), rows)


def kernel_constants(rows: Sequence[Row]) -> Figure:
    """Draw the constants of the student's kernel; a fixed one is a flat line."""
    return _draw_panels(_single_panels(rows, "kernel_", _CONSTANT_LABELS), rows)


def training_course(rows: Sequence[Row]) -> Figure:
    """Draw learning rate, gradient norm and speed."""
    panels = [
        Panel(
            label,
            {key: label},
            from_zero=key.endswith("_per_second") or key in {"mfu", "lr"},
        )
        for key, label in _COURSE_LABELS.items()
        if read_series(rows, key)[0].size
    ]
    return _draw_panels(panels, rows)


def heldout_gap(rows: Sequence[Row]) -> Figure:
    """Draw how near the tower came to the teacher on held-out images, and zero-shot accuracy."""
    panels = [
        Panel(
            "gap to the teacher's kernel",
            {
                "heldout_kernel_gap": "aligned tower",
                "heldout_kernel_gap_original": "original tower, same kernel",
            },
        ),
        Panel(
            "linear CKA with the teacher", {"heldout_cka_teacher": "aligned tower"}, least_span=0.1
        ),
        Panel("zero-shot accuracy", {"heldout_zero_shot": "aligned tower"}, least_span=0.1),
    ]
    return _draw_panels(panels, rows, marker="o")


def drift(rows: Sequence[Row]) -> Figure:
    """Draw how far the tower moved away from the original on held-out images."""
    panels = [
        Panel("cosine to the original embedding", {"heldout_drift_cosine_mean": "mean"}),
        Panel(
            "distance to the original embedding",
            {"heldout_drift_distance_mean": "mean", "heldout_drift_distance_max": "largest"},
            from_zero=True,
        ),
        Panel(
            "bound on image-text cosines (Prop. 3.2)",
            {"heldout_drift_bound_mean": "mean", "heldout_drift_bound_max": "largest"},
            from_zero=True,
        ),
        Panel(
            "relative drift of the patch tokens",
            {"heldout_patch_drift": "all tokens"},
            from_zero=True,
        ),
    ]
    return _draw_panels(panels, rows, marker="o")


def kernel_differences(matrices: Mapping[str, ArrayLike]) -> Figure:
    """Draw what separates the kernel matrices from the teacher's, and what training changed.

    Args:
        matrices: Square matrices of one size named `original`, `aligned` and `teacher`.

    Raises:
        ValueError: If one is missing or the shapes differ.
    """
    arrays = {name: np.asarray(matrix, dtype=np.float64) for name, matrix in matrices.items()}
    if not {"original", "aligned", "teacher"} <= arrays.keys():
        raise ValueError(f"original, aligned and teacher are needed, not {sorted(arrays)}.")
    if len({array.shape for array in arrays.values()}) != 1:
        raise ValueError("kernel matrices need one common shape.")
    differences = {
        "original - teacher": arrays["original"] - arrays["teacher"],
        "aligned - teacher": arrays["aligned"] - arrays["teacher"],
        "aligned - original": arrays["aligned"] - arrays["original"],
    }
    off_diagonal = ~np.eye(len(arrays["teacher"]), dtype=bool)
    limit = max(float(np.abs(array).max()) for array in differences.values()) or 1.0
    with drawing_style():
        figure = Figure(figsize=(9.9, 4.0), layout="constrained")
        panels = list(figure.subplots(1, 3))
        for axes, (name, array) in zip(panels, differences.items(), strict=True):
            picture = axes.imshow(array, vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="equal")
            size = float(np.abs(array[off_diagonal]).mean())
            axes.set_title(f"{name}\nmean size {size:.3f}")
            axes.set_xlabel("image")
            axes.set_yticks([])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.spines[:].set_visible(False)
        bar = figure.colorbar(picture, ax=panels, shrink=0.8, pad=0.02)
        bar.set_label("difference of similarities")
    return figure


def attention_maps(
    images: NDArray[np.uint8], original: NDArray[np.floating], aligned: NDArray[np.floating]
) -> Figure:
    """Draw where the tower looks before and after, over the images.

    The two maps of an image share one scale, so that a sharper map also looks sharper.

    Args:
        images: uint8, (n, height, width, 3).
        original: Attention of the class token to the patches, (n, grid, grid).
        aligned: The same after training.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    count = len(images)
    shapes = (original.shape, aligned.shape)
    if images.ndim != 4 or images.shape[3] != 3 or not count or original.ndim != 3:
        raise ValueError(f"images and maps of the shapes {images.shape}, {shapes} cannot be drawn.")
    if original.shape != aligned.shape or len(original) != count:
        raise ValueError(f"maps of the shapes {shapes} do not fit {count} images.")
    blocks = 2 if count > 3 else 1  # side by side, else a few images would make a long strip
    lines = math.ceil(count / blocks)
    with drawing_style():
        figure = Figure(figsize=(1.62 * 3 * blocks + 0.5, 1.68 * lines + 0.3))
        # An empty column keeps the two blocks apart.
        ratios = [1.0, 1.0, 1.0, 0.18, 1.0, 1.0, 1.0] if blocks == 2 else [1.0, 1.0, 1.0]
        grid = figure.add_gridspec(
            lines, len(ratios), width_ratios=ratios, wspace=0.05, hspace=0.05
        )
        for index in range(count):
            line, block = index % lines, index // lines
            places = [figure.add_subplot(grid[line, 4 * block + column]) for column in range(3)]
            _draw_attention(places, images[index], original[index], aligned[index])
            if line == 0:
                for axes, title in zip(places, ("image", "original", "aligned"), strict=True):
                    axes.set_title(title)
    return figure


def _draw_attention(
    places: Sequence[Axes],
    image: NDArray[np.uint8],
    original: NDArray[np.floating],
    aligned: NDArray[np.floating],
) -> None:
    low = float(min(original.min(), aligned.min()))
    high = float(max(original.max(), aligned.max()))
    pictures = [image, *(_overlay(image, values, low, high) for values in (original, aligned))]
    for axes, picture in zip(places, pictures, strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)


def _overlay(
    image: NDArray[np.uint8], values: NDArray[np.floating], low: float, high: float
) -> NDArray[np.floating]:
    """Return attention in colour over the picture in grey, (height, width, 3) in [0, 1]."""
    height, width = image.shape[:2]
    lines = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    shown = (values[np.ix_(lines, columns)] - low) / ((high - low) or 1.0)
    colours = colormaps["inferno"](shown)[..., :3]
    grey = image.mean(2, keepdims=True) / 255
    # Mixed here: matplotlib would write the opacity of a translucent picture twice into an SVG.
    mixed: NDArray[np.floating] = 0.62 * colours + 0.38 * grey
    return mixed


def _single_panels(rows: Sequence[Row], prefix: str, labels: Mapping[str, str]) -> list[Panel]:
    """Return a panel for each logged key of a prefix, those with a known name first."""
    logged = {key for row in rows for key in row if key.startswith(prefix)}
    keys = [key for key in labels if key in logged] + sorted(logged - labels.keys())
    return [
        Panel(label, {key: label})
        for key in keys
        if read_series(rows, key)[0].size
        for label in [labels.get(key, key.removeprefix(prefix).strip("_").replace("_", " "))]
    ]


def _draw_panels(panels: Sequence[Panel], rows: Sequence[Row], marker: str | None = None) -> Figure:
    """Draw panels over the same steps, in columns where there are several."""
    shown = [
        panel for panel in panels if any(read_series(rows, key)[0].size for key in panel.lines)
    ]
    count = max(1, len(shown))
    # Three in a row leave no hole, two look better otherwise.
    columns = 3 if count % 3 == 0 else min(count, 2)
    lines = math.ceil(count / columns)
    with drawing_style():
        figure = Figure(
            figsize=(1.8 + 3.9 * columns, 2.9 * lines),
            layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04),
        )
        places = list(np.atleast_1d(figure.subplots(lines, columns, sharex=True)).flat)
        for axes in places[count:]:
            axes.remove()
        places = places[:count]
        for axes in places:
            axes.grid(color="#e3e3e3", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        for axes, panel in zip(places, shown, strict=False):
            _draw_panel(axes, panel, rows, marker)
        if not shown:
            say_empty(places[0])
        for axes in places[-columns:]:
            # Shared axes hide the numbers of a panel whose lower neighbour is missing.
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step")
    return figure


def _draw_panel(axes: Axes, panel: Panel, rows: Sequence[Row], marker: str | None) -> None:
    # A preservation term starts at exactly zero, which a log scale cannot show.
    positive = [
        {**row, **{key: None for key in panel.lines if not _is_positive(row.get(key))}}
        for row in rows
    ]
    is_log = not panel.from_zero and spans_decades(
        [read_series(positive, key)[1] for key in panel.lines if read_series(positive, key)[0].size]
    )
    lost = sum(
        read_series(rows, key)[0].size - read_series(positive, key)[0].size for key in panel.lines
    )
    if is_log and lost <= len(panel.lines):
        rows = positive
    else:
        is_log = False
    draw_lines(axes, rows, panel.lines, with_legend=False, marker=marker)
    if is_log:
        set_log_scale(axes)
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    low, high = axes.get_ylim()
    if high - low < panel.least_span:
        middle = (low + high) / 2
        axes.set_ylim(middle - panel.least_span / 2, middle + panel.least_span / 2)
    _format_small(axes)
    axes.set_title(panel.title + (" (log scale)" if is_log else ""), loc="left")
    if len(axes.get_lines()) > 1:
        axes.legend(loc="best", handlelength=2.4)


def _format_small(axes: Axes) -> None:
    if axes.get_yscale() == "linear":
        # 1e-5 as a factor above the axis would hide behind the title.
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
