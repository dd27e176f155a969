"""What a score of the LLaVA columns does not say of itself: boxes that were none, or of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kuea_mllm.evaluation.results import SampleRow
from kuea_mllm.evaluation.suites.registry import PlannedColumn
from kuea_mllm.evaluation.suites.sources import BOX_METRIC, PADDED, Source

_OTHER_SQUARE = (
    "boxes are mapped from a square with the whole image in its middle, and this model's images "
    "are not padded to one; right only if it has learned boxes of that square"
)


def remarks_on(
    entry: Mapping[str, Any], rows: Sequence[SampleRow], runtime: Mapping[str, Any]
) -> list[str]:
    """Return what has to be known about a column's score besides it.

    Args:
        entry: The column's entry in the summary.
        rows: Its answers.
        runtime: How the model runs, in its own words.
    """
    if entry["metric"] != BOX_METRIC:
        return []
    remarks = []
    none = sum(row.answer_box is None and not row.failed for row in rows)
    if none:
        remarks.append(f"{none:,} of {len(rows):,} answers are no box and count as wrong")
    if entry["protocol"] == PADDED and runtime.get("pads_to_square") is False:
        remarks.append(_OTHER_SQUARE)
    return remarks


def foreign_boxes(planned: Sequence[PlannedColumn], runtime: Mapping[str, Any]) -> str | None:
    """Say before the first question which columns take boxes for what they are not, if any."""
    columns = [
        column.column
        for column in planned
        if column.protocol == PADDED
        and isinstance(column.source, Source)
        and column.source.metric == BOX_METRIC
    ]
    if not columns or runtime.get("pads_to_square") is not False:
        return None
    return f"{', '.join(columns)}: {_OTHER_SQUARE}. --protocol paper compares boxes as they are."
