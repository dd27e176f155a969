"""The mean over the columns of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kuea_mllm.evaluation.pairing import ColumnComparison
from kuea_mllm.evaluation.stats import LEVEL, ROUNDING, Array, Verdict, bootstrap_p, decide


@dataclass(frozen=True)
class AverageComparison:
    """Candidate minus baseline, averaged over columns; fractions of the highest score.

    Attributes:
        columns: Columns in the average.
        excluded: Columns that are not, with the reason.
        baseline: Mean score of the first run.
        candidate: Mean score of the second run.
        difference: Mean difference.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        p_value: Two-sided p of "no difference".
        verdict: What may be concluded.
        note: A warning about the columns.
    """

    columns: tuple[str, ...]
    excluded: dict[str, str]
    baseline: float
    candidate: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    verdict: Verdict
    note: str | None

    def to_json(self) -> dict[str, Any]:
        """Write the average as JSON values."""
        return {**vars(self), "columns": list(self.columns), "excluded": dict(self.excluded)}


def compare_average(columns: Sequence[ColumnComparison]) -> AverageComparison | None:
    """Average the columns whose documents were scored between 0 and their highest score.

    Every column is resampled by itself; the average of the resampled differences gives interval
    and p-value. Images that several columns share are thereby taken as independent.

    Returns:
        None if fewer than two columns can be averaged.
    """
    excluded = {column.task: why for column in columns if (why := _why_not(column)) is not None}
    used = [column for column in columns if column.task not in excluded]
    if len(used) < 2:
        return None
    scores = [
        float(np.mean([_part(column, name) for column in used]))
        for name in ("baseline", "candidate", "difference")
    ]
    without_spread = [column.task for column in used if column.draws is None]
    low, high, p_value = (None, None, None) if without_spread else _interval(used)
    note = None
    if without_spread:
        note = f"no interval: {', '.join(without_spread)} has samples of one cluster only."
    return AverageComparison(
        columns=tuple(column.task for column in used),
        excluded=excluded,
        baseline=scores[0],
        candidate=scores[1],
        difference=scores[2],
        low=low,
        high=high,
        p_value=p_value,
        verdict=decide(scores[2], low, high, p_value),
        note=note,
    )


def _interval(columns: Sequence[ColumnComparison]) -> tuple[float, float, float]:
    draws: Array = np.mean(
        [column.draws / column.scale for column in columns if column.draws is not None], axis=0
    )
    low, high = (float(end) for end in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    for column in columns:
        # Where resampling shows no spread the column has bounds of another kind: add their width.
        if column.draws is not None and float(np.ptp(column.draws)) <= ROUNDING:
            low += (_part(column, "low") - _part(column, "difference")) / len(columns)
            high += (_part(column, "high") - _part(column, "difference")) / len(columns)
    return low, high, bootstrap_p(draws, sum(column.changed_clusters for column in columns))


def _part(column: ColumnComparison, name: str) -> float:
    return float(getattr(column, name)) / column.scale


def _why_not(column: ColumnComparison) -> str | None:
    if not column.is_paired:
        return column.reason or "not paired"
    if not column.higher_is_better:
        return "lower is better"
    if not column.bounded:
        return f"scores outside 0..{column.scale}"
    return None
