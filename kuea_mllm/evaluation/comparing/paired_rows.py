"""The rows of two systems on the same questions, side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.comparing.resampling import ROUNDING, Stratum
from kuea_mllm.evaluation.results import Results, SampleRow
from kuea_mllm.evaluation.statistics import (
    ALL_RIGHT_IN_CLUSTER,
    MEAN_OF_GROUP_RATIOS,
    RATIO_OF_SUMS,
    ROC_AUC,
    Outcomes,
)

Pair = tuple[SampleRow, SampleRow]

RATIOS = (RATIO_OF_SUMS, MEAN_OF_GROUP_RATIOS)

_BELONGS_TO_TEST = ("cluster", "group", "label")


def name_clusters(runs: Sequence[Sequence[Pair]]) -> str | None:
    """Return what the clusters of a column are recognised by in others, as a digest.

    Two columns with the same clusters ask about the same images (TextVQA with and without OCR, a
    data set at 0 and at 4 shots). None where documents are their own clusters: then it is not known
    what they are about.
    """
    rows = [row for pairs in runs for row, _ in pairs]
    if all(row.cluster == str(row.doc_id) for row in rows):
        return None
    digest = hashlib.sha256()
    for name in sorted({row.cluster for row in rows}):
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def pair_rows(task: str, first: Results, second: Results) -> list[Pair]:
    """Put the rows of two runs side by side.

    Raises:
        EvaluationError: If the runs do not hold the same documents, in the same groups.
    """
    rows, others = first.rows(task), {row.doc_id: row for row in second.rows(task)}
    missing = [row.doc_id for row in rows if row.doc_id not in others]
    if missing or len(rows) != len(others):
        raise EvaluationError(
            f"column {task}: {_file(second, task)} has not the documents of {_file(first, task)}; "
            f"the first one missing is {missing[0] if missing else 'in the latter'}.",
            "Evaluate both with the same data and the same --limit.",
        )
    pairs = [(row, others[row.doc_id]) for row in rows]
    for row, other in pairs:
        for key in _BELONGS_TO_TEST:
            values = getattr(row, key), getattr(other, key)
            if values[0] != values[1]:
                raise EvaluationError(
                    f"column {task}: document {row.doc_id} has {key} {values[0]!r} in "
                    f"{_file(first, task)} and {values[1]!r} in {_file(second, task)}.",
                    "Evaluate both with the same task files and data.",
                )
    return pairs


def _file(results: Results, task: str) -> Path:
    return results.path / str(results.columns[task]["samples"])


def usable_pairs(pairs: Sequence[Pair], statistic: str) -> list[Pair]:
    """Keep the documents that both runs answered and that have a score.

    Where a cluster counts as one answer (both images of a pair), it is kept as a whole or not.
    """
    lost = {row.cluster for row, other in pairs if not (_has_score(row) and _has_score(other))}
    if statistic == ALL_RIGHT_IN_CLUSTER:
        return [pair for pair in pairs if pair[0].cluster not in lost]
    return [pair for pair in pairs if _has_score(pair[0]) and _has_score(pair[1])]


def make_strata(used: Sequence[Sequence[Pair]], statistic: str, scale: int) -> list[Stratum]:
    """Put the runs of seeds that share clusters together: those are drawn for all of them.

    Where clusters of different documents happen to have the same names, drawing them together
    does no harm: they are as good a pair of independent draws as any.
    """
    groups: list[tuple[set[str], list[Sequence[Pair]]]] = []
    for pairs in used:
        names = {row.cluster for row, _ in pairs}
        members = [pairs]
        apart = []
        for known, others in groups:
            if known & names:
                names, members = names | known, [*others, *members]
            else:
                apart.append((known, others))
        groups = [*apart, (names, members)]
    return [_stratum(members, sorted(names), statistic, scale) for names, members in groups]


def _stratum(
    seeds: Sequence[Sequence[Pair]], names: Sequence[str], statistic: str, scale: int
) -> Stratum:
    baseline, candidate = (
        tuple(
            Outcomes.of_rows(statistic, [pair[side] for pair in pairs], names).measure(
                statistic, scale
            )
            for pairs in seeds
        )
        for side in (0, 1)
    )
    samples = len({row.doc_id for pairs in seeds for row, _ in pairs})
    return Stratum(baseline, candidate, len(names), samples, tuple(names))


def document_gains(
    used: Sequence[Sequence[Pair]], statistic: str, *, is_one_test: bool
) -> dict[tuple[int, int], float]:
    """Return how much the score of each document rose, the sum over seeds of the same test.

    Returns:
        By number of the test (0 where all seeds took the same) and document.
    """
    gains: dict[tuple[int, int], float] = {}
    for number, pairs in enumerate(used):
        for before, after in pairs:
            key = (0 if is_one_test else number, before.doc_id)
            gain = _own_score(after, statistic) - _own_score(before, statistic)
            gains[key] = gains.get(key, 0.0) + gain
    return {key: gain for key, gain in gains.items() if abs(gain) > ROUNDING}


def _own_score(row: SampleRow, statistic: str) -> float:
    """Return what a document alone says: right or wrong for an area, a ratio for a judgement."""
    score = row.score or 0.0
    if statistic == ROC_AUC:
        return float((score > 0.5) == bool(row.label))
    if statistic in RATIOS:
        return score / row.reference if row.reference else 0.0
    return score


def _has_score(row: SampleRow) -> bool:
    return not row.failed and row.score is not None
