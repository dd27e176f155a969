"""One column of a comparison: the same questions, answered by two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.results import Results, SampleRow, finite
from kuea_mllm.evaluation.stats import Array, PairedDifference, Verdict, compare_pairs


@dataclass(frozen=True)
class Flips:
    """Documents whose score moved in one direction."""

    doc_ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Write count and ids."""
        return {"count": len(self.doc_ids), "doc_ids": list(self.doc_ids)}


@dataclass(frozen=True)
class ColumnComparison:
    """What one task says about candidate minus baseline.

    Attributes:
        task: Name of the task.
        metric: Its main metric.
        version: Version of the task.
        higher_is_better: Direction of the metric.
        scale: Highest score of a document, 1 or 100.
        is_paired: Whether documents could be compared one by one.
        reason: Why not.
        baseline: Score of the first run on the documents used.
        candidate: Score of the second run on them.
        difference: Candidate minus baseline; None if a run has no score.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end of it.
        p_value: Two-sided p of this column alone.
        p_holm: The same, adjusted for the number of columns.
        test: How the p-value was found.
        verdict: What may be concluded, after adjustment.
        detectable: Smallest true difference that this sample finds with 80 % power.
        n: Documents used.
        clusters: Independent groups among them.
        dropped: Documents left out because a run has no answer for them.
        answers_changed: Documents whose answer text differs.
        improved: Documents whose score moved in the good direction.
        worsened: Documents whose score moved in the bad direction.
        note: A warning about a small or degenerate sample.
        bounded: Whether all scores lie between 0 and `scale`.
        draws: Bootstrap differences, for averages over columns.
        changed_clusters: Clusters whose score changed.
    """

    task: str
    metric: str
    version: str | int | float | None
    higher_is_better: bool
    scale: int
    is_paired: bool
    reason: str | None
    baseline: float | None
    candidate: float | None
    difference: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    test: Literal["mcnemar", "bootstrap"] | None = None
    verdict: Verdict = "cannot tell"
    detectable: float | None = None
    n: int = 0
    clusters: int = 0
    dropped: tuple[int, ...] = ()
    answers_changed: int = 0
    improved: Flips = field(default_factory=Flips)
    worsened: Flips = field(default_factory=Flips)
    note: str | None = None
    bounded: bool = True
    draws: Array | None = field(default=None, repr=False, compare=False)
    changed_clusters: int = 0

    def with_verdict(self, p_holm: float | None, verdict: Verdict) -> ColumnComparison:
        """Add what depends on the other columns."""
        return replace(self, p_holm=p_holm, verdict=verdict)

    def to_json(self) -> dict[str, Any]:
        """Write the column as JSON values."""
        hidden = {"draws", "changed_clusters", "bounded", "is_paired"}
        content = {key: value for key, value in vars(self).items() if key not in hidden}
        return {
            **content,
            "paired": self.is_paired,
            "dropped": list(self.dropped),
            "improved": self.improved.to_json(),
            "worsened": self.worsened.to_json(),
        }


def compare_column(
    task: str, first: Results, second: Results, *, resamples: int, seed: np.random.SeedSequence
) -> ColumnComparison:
    """Compare one task of two runs that took the same test.

    Raises:
        EvaluationError: If the sample files do not hold the same documents.
    """
    before, after = first.columns[task], second.columns[task]
    pairs = _pair_rows(task, first.rows(task), second.rows(task))
    used = [pair for pair in pairs if not (pair[0].failed or pair[1].failed)]
    reason = before["reason"] or after["reason"]
    if reason is None and before["scale"] != after["scale"]:
        # A score of exactly 0 fits both scales; the other run knows which one it is.
        is_empty = 0.0 in (before["score"], after["score"])
        reason = None if is_empty else "the two runs report scores on different scales"
    if reason is None and not used:
        reason = "no document was answered by both runs"
    bare = _bare_column(task, before=before, after=after, pairs=pairs, used=used, reason=reason)
    if reason is not None:
        return bare
    scores = [np.array([pair[side].score for pair in used], dtype=np.float64) for side in (0, 1)]
    clusters = [row.cluster for row, _ in used]
    top = max(bare.scale, *(float(np.abs(side).max()) for side in scores))
    found = compare_pairs(scores[0], scores[1], clusters, top=top, resamples=resamples, seed=seed)
    sign = 1.0 if bare.higher_is_better else -1.0
    gains = (scores[1] - scores[0]) * sign
    return replace(
        bare,
        baseline=float(scores[0].mean()),
        candidate=float(scores[1].mean()),
        improved=_flips(used, gains > 0),
        worsened=_flips(used, gains < 0),
        bounded=all(bool(np.all((side >= 0) & (side <= bare.scale))) for side in scores),
        changed_clusters=len({name for name, gain in zip(clusters, gains, strict=True) if gain}),
        **_statistics(found),
    )


def _statistics(found: PairedDifference) -> dict[str, Any]:
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "test": found.test,
        "detectable": found.detectable,
        "note": found.note,
        "draws": found.draws,
    }


def _bare_column(
    task: str,
    *,
    before: Any,
    after: Any,
    pairs: Sequence[tuple[SampleRow, SampleRow]],
    used: Sequence[tuple[SampleRow, SampleRow]],
    reason: str | None,
) -> ColumnComparison:
    scores = finite(before["score"]), finite(after["score"])
    known = None if scores[0] is None or scores[1] is None else scores[1] - scores[0]
    return ColumnComparison(
        task=task,
        metric=before["metric"],
        version=before["version"],
        higher_is_better=bool(before["higher_is_better"]),
        scale=max(int(before["scale"]), int(after["scale"])),
        is_paired=reason is None,
        reason=reason,
        baseline=scores[0],
        candidate=scores[1],
        difference=known,
        n=len(used),
        clusters=len({row.cluster for row, _ in used}),
        dropped=tuple(row.doc_id for row, other in pairs if row.failed or other.failed),
        answers_changed=sum(row.answer != other.answer for row, other in used),
    )


def _pair_rows(
    task: str, first: Sequence[SampleRow], second: Sequence[SampleRow]
) -> list[tuple[SampleRow, SampleRow]]:
    others = {row.doc_id: row for row in second}
    missing = [row.doc_id for row in first if row.doc_id not in others]
    if missing or len(first) != len(second):
        raise EvaluationError(
            f"column {task}: the two runs have different documents; the first one missing is "
            f"{missing[0] if missing else 'in the other run'}.",
            "Evaluate both with the same data and the same --limit.",
        )
    return [(row, others[row.doc_id]) for row in first]


def _flips(used: Sequence[tuple[SampleRow, SampleRow]], moved: Any) -> Flips:
    return Flips(
        tuple(row.doc_id for (row, _), is_moved in zip(used, moved, strict=True) if is_moved)
    )
