"""Figures of `kuea-mllm look`: pairs of pictures that moved, and layers compared with layers.

Kernel matrices are drawn by `figures`, attention by `alignment_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kuea_mllm.reporting.drawing import drawing_style

__all__ = ["layer_likeness", "picture_pairs"]

_SIDE = 112
_TICKS = 6


def picture_pairs(pictures: NDArray[np.uint8], titles: Sequence[str]) -> Figure:
    """Draw pairs of pictures, each pair side by side below its title.

    Args:
        pictures: uint8, (pairs, 2, height, width, 3).
        titles: One for each pair.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    shape = pictures.shape
    if (
        pictures.ndim != 5
        or shape[1] != 2
        or shape[4] != 3
        or shape[0] != len(titles)
        or not titles
    ):
        raise ValueError(f"{len(titles)} titles and pictures of the shape {shape} cannot be drawn.")
    columns = min(3, len(titles))
    lines = math.ceil(len(titles) / columns)
    with drawing_style():
        figure = Figure(figsize=(3.3 * columns, 1.95 * lines), layout="constrained")
        cells = figure.subfigures(lines, columns, squeeze=False, wspace=0.04, hspace=0.02)
        for cell, pair, title in zip(cells.flat, pictures, titles, strict=False):
            cell.suptitle(title, fontsize=9.5)
            for axes, picture in zip(cell.subplots(1, 2), pair, strict=True):
                axes.imshow(_small(picture), interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
    return figure


def layer_likeness(
    names: Sequence[tuple[str, int]], cka: NDArray[np.floating], couples: Sequence[tuple[str, str]]
) -> Figure:
    """Draw the CKA of all layers of one model with all layers of another, a panel for each couple.

    Args:
        names: Model and layer of every row of `cka`.
        cka: Likeness of all layers, (layers, layers).
        couples: Models to set against each other: along the vertical, along the horizontal.

    Raises:
        ValueError: If a model has no layer, or the shapes do not fit.
    """
    if cka.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} names do not fit a matrix of the shape {cka.shape}.")
    rows = {
        model: [index for index, (owner, _) in enumerate(names) if owner == model]
        for couple in couples
        for model in couple
    }
    if not couples or not all(rows.values()):
        raise ValueError(f"layers of {sorted(rows)} are needed.")
    with drawing_style():
        figure = Figure(figsize=(3.4 * len(couples) + 0.9, 3.7), layout="constrained")
        panels = list(np.atleast_1d(figure.subplots(1, len(couples))))
        for axes, (first, second) in zip(panels, couples, strict=True):
            picture = axes.imshow(
                cka[np.ix_(rows[first], rows[second])],
                vmin=0.0,
                vmax=1.0,
                cmap="viridis",
                origin="lower",
                interpolation="none",
                aspect="auto",
            )
            axes.set_xlabel(f"{second}: layer")
            axes.set_ylabel(f"{first}: layer")
            axes.set_xticks(_ticks(len(rows[second])))
            axes.set_yticks(_ticks(len(rows[first])))
            axes.spines[:].set_visible(False)
        figure.colorbar(picture, ax=panels, shrink=0.85, pad=0.02).set_label("linear CKA")
    return figure


def _ticks(layers: int) -> list[int]:
    # Whole layers, the last one always: it is the one that most readers look for.
    step = max(1, math.ceil((layers - 1) / _TICKS))
    return sorted({*range(0, layers - step // 2, step), layers - 1})


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return every n-th pixel, averaged, so that a page of pictures stays small."""
    step = max(1, math.ceil(max(picture.shape[:2]) / _SIDE))
    height, width = (side // step * step for side in picture.shape[:2])
    blocks = picture[:height, :width].reshape(height // step, step, width // step, step, 3)
    smaller: NDArray[np.uint8] = blocks.mean((1, 3)).round().astype(np.uint8)
    return smaller
