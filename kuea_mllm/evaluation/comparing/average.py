"""The mean over the columns of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kuea_mllm.evaluation.comparing.pairing import ColumnComparison, seeds_json
from kuea_mllm.evaluation.comparing.resampling import ROUNDING, percentile_interval
from kuea_mllm.evaluation.comparing.shared_pictures import widening
from kuea_mllm.evaluation.comparing.stats import (
    SeedSpread,
    Verdict,
    bootstrap_p,
    decide,
    seed_spread,
)
from kuea_mllm.evaluation.measures import Array


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
        seeds: Spread of the average between the runs of several seeds.
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
    seeds: SeedSpread | None
    note: str | None

    def to_json(self) -> dict[str, Any]:
        """Write the average as JSON values."""
        return {
            **vars(self),
            "columns": list(self.columns),
            "excluded": dict(self.excluded),
            "seeds": seeds_json(self.seeds),
        }


def compare_average(
    columns: Sequence[ColumnComparison], *, judged: bool = True
) -> AverageComparison | None:
    """Average the columns that are paired and have a highest score.

    Columns of a suite are averaged as the paper does, CIDEr included, and MMVP too, which the
    paper's Table 5 leaves out; others where all documents were scored between 0 and the highest
    score. A column without a score is left out, not zero.

    Every column is resampled by itself; the average of the resampled differences gives interval
    and p-value. Columns about exactly the same images (recall at 1, 5 and 10, a data set at 0 and
    at 4 shots) are taken as fully dependent, which can only widen the interval. Where columns share
    only some images, the spread is that of differences which depend on each other by those images.

    Args:
        columns: The columns.
        judged: Whether columns that a judge scored are in the average.

    Returns:
        None if fewer than two columns can be averaged.
    """
    excluded = {}
    for column in columns:
        why = _why_not(column) or ("scored by a judge" if column.judged and not judged else None)
        if why is not None:
            excluded[column.task] = why
    used = [column for column in columns if column.task not in excluded]
    if len(used) < 2:
        return None
    scores = [
        float(np.mean([_part(column, name) for column in used]))
        for name in ("baseline", "candidate", "difference")
    ]
    without_spread = [column.task for column in used if column.draws is None]
    low, high, p_value = (None, None, None) if without_spread else _interval(used)
    notes = []
    if without_spread:
        notes.append(f"no interval: {', '.join(without_spread)} has samples of one cluster only.")
    protocols = sorted({column.protocol for column in used})
    if len(protocols) > 1:
        notes.append(f"the average mixes protocols ({', '.join(protocols)}): no published number.")
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
        seeds=_seeds(used),
        note=" ".join(notes) or None,
    )


def _seeds(columns: Sequence[ColumnComparison]) -> SeedSpread | None:
    differences = [
        np.array(column.seeds.differences) / column.scale for column in columns if column.seeds
    ]
    return seed_spread(np.mean(differences, axis=0).tolist()) if differences else None


def _interval(columns: Sequence[ColumnComparison]) -> tuple[float, float, float]:
    groups: dict[str, list[ColumnComparison]] = {}
    for column in columns:
        groups.setdefault(column.pictures or f"task {column.task}", []).append(column)
    rng = np.random.default_rng(0)
    parts = [_draws(members, rng) for members in groups.values()]
    draws: Array = np.sum(parts, axis=0)
    wider = widening(parts, [[column.pulls for column in group] for group in groups.values()])
    if wider != 1.0:
        centre = float(draws.mean())
        draws = centre + wider * (draws - centre)
    draws /= len(columns)
    freedom = sum(max(member.clusters - 1 for member in members) for members in groups.values())
    low, high = percentile_interval(draws, freedom)
    for column in columns:
        # Where resampling shows no spread the column has bounds of another kind: add their width.
        if column.draws is not None and float(np.ptp(column.draws)) <= ROUNDING:
            low += (_part(column, "low") - _part(column, "difference")) / len(columns)
            high += (_part(column, "high") - _part(column, "difference")) / len(columns)
    return low, high, bootstrap_p(draws, sum(column.changed_clusters for column in columns))


def _draws(columns: Sequence[ColumnComparison], rng: np.random.Generator) -> Array:
    """Return the sum of the resampled differences of columns about the same images."""
    draws = [column.draws / column.scale for column in columns if column.draws is not None]
    if len(draws) == 1:
        return draws[0]
    # Lowest with lowest, highest with highest: no dependence between them spreads the sum wider.
    together: Array = np.sum([np.sort(column) for column in draws], axis=0)
    return rng.permutation(together)


def _part(column: ColumnComparison, name: str) -> float:
    return float(getattr(column, name)) / column.scale


def _why_not(column: ColumnComparison) -> str | None:
    if not column.is_paired:
        return column.missing or column.reason or "not paired"
    if not column.higher_is_better:
        return "lower is better"
    if column.suite is None and not column.bounded:
        return f"scores outside 0..{column.scale}"
    return None
