"""What an alignment run shows: terminal lines, figures, a section of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.io import read_json
from kuea_mllm.reporting.blocks import Figure, Paragraph, Section, Table

_MEASURED = {
    "heldout_kernel_gap": "kernel gap to the teacher",
    "heldout_kernel_gap_original": "the same, original tower under the present kernel",
    "heldout_drift_cosine_mean": "cosine to the original embedding, mean",
    "heldout_drift_distance_mean": "distance to the original embedding, mean",
    "heldout_drift_bound_mean": "bound on the drift of image-text cosines (Proposition 3.2), mean",
}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw_alignment_figures(directory: Path) -> None:
    """Write loss curves, drift, kernel parameters and kernel matrices to `figures/`."""
    from kuea_mllm.reporting.figures import (
        drift_curves,
        kernel_matrices,
        kernel_parameters,
        loss_curves,
        save_figure,
    )

    rows = read_metrics(directory)
    figures = directory / "figures"
    figures.mkdir()
    save_figure(loss_curves(rows), figures / "loss.png")
    save_figure(drift_curves(rows), figures / "drift.png")
    if any("kernel_gamma" in row for row in rows):
        save_figure(kernel_parameters(rows), figures / "kernel_parameters.png")
    matrices = read_json(directory / "kernel_matrices.json")
    save_figure(kernel_matrices(matrices), figures / "kernel_matrices.png")


def print_alignment_result(
    directory: str, *, before: Mapping[str, float], after: Mapping[str, float], seconds: float
) -> None:
    """Print what a finished run measured."""
    from rich.console import Console

    from kuea_mllm.reporting.tables import key_values

    items = [
        (text, f"{before[name]:.4g} -> {after[name]:.4g}")
        for name, text in _MEASURED.items()
        if name in before
    ]
    title = f"aligned tower: {directory}/tower"
    Console().print(key_values(title, [*items, ("seconds", f"{seconds:.0f}")]))


def alignment_section(directory: Path) -> Section:
    """Return the section of a report that tells about one alignment run."""
    from kuea_mllm.reporting.figures import figure_svg, kernel_matrices, loss_curves

    rows = read_metrics(directory)
    matrices = read_json(directory / "kernel_matrices.json")
    measured = [row for row in rows if "heldout_kernel_gap" in row]
    first, last = measured[0], measured[-1]
    table = Table(
        caption="Held-out images, before and after.",
        header=("Quantity", "Before", "After"),
        rows=[
            (text, f"{first[name]:.4g}", f"{last[name]:.4g}")
            for name, text in _MEASURED.items()
            if name in first
        ],
        numeric=frozenset({1, 2}),
    )
    return Section(
        "Alignment",
        [
            Paragraph(
                "Each matrix compares every picture with every other. Training moves the tower's "
                "matrix towards the teacher's, while the preservation term keeps every embedding "
                "near its original, so that text and LLM still understand it."
            ),
            Figure(
                figure_svg(kernel_matrices(matrices), "kernel-matrices"),
                alt="Kernel matrices of the original tower, the aligned tower and the teacher",
                caption="Kernel matrices of the same held-out pictures, one colour scale.",
            ),
            Figure(
                figure_svg(loss_curves(rows), "loss-curves"),
                alt="Loss terms over the steps of the run",
                caption="Loss terms during alignment.",
            ),
            table,
        ],
    )
