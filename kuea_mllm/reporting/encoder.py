"""Scores of a tower by itself, before and after."""

from __future__ import annotations

from collections.abc import Mapping

from kuea_mllm.reporting.blocks import Table


def encoder_table(original: Mapping[str, float], aligned: Mapping[str, float]) -> Table:
    """Return a table of the metrics that both towers have, in percent."""
    rows = [
        (
            name.replace("_", " ").replace("/", ": "),
            f"{original[name]:.1f}",
            f"{aligned[name]:.1f}",
            f"{aligned[name] - original[name]:+.1f}",
        )
        for name in original
        if name in aligned
    ]
    return Table(
        caption="Scores in percent; differences in points.",
        header=("Measurement", "Original", "Aligned", "Difference"),
        rows=rows,
        numeric=frozenset({1, 2, 3}),
    )
