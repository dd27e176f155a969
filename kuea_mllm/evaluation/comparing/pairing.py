"""One column of a comparison: the same questions, answered by two systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from kuea_mllm.evaluation.comparing.paired_rows import (
    RATIOS,
    Pair,
    document_gains,
    make_strata,
    name_clusters,
    pair_rows,
    usable_pairs,
)
from kuea_mllm.evaluation.comparing.resampling import Stratum
from kuea_mllm.evaluation.comparing.shared_pictures import Pulls, picture_pulls
from kuea_mllm.evaluation.comparing.stats import (
    SeedSpread,
    Test,
    Verdict,
    compare_measures,
    seed_spread,
)
from kuea_mllm.evaluation.measures import Array, Measure
from kuea_mllm.evaluation.results import Results, finite
from kuea_mllm.evaluation.scores import lost_groups
from kuea_mllm.evaluation.statistics import MEAN, measure_value


@dataclass(frozen=True)
class Flips:
    """Documents whose score moved in one direction.

    Attributes:
        count: How many.
        doc_ids: Which; empty where the runs of several seeds had different documents.
    """

    count: int = 0
    doc_ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Write count and ids."""
        return {"count": self.count, "doc_ids": list(self.doc_ids)}


@dataclass(frozen=True)
class ColumnComparison:
    """What one task says about candidate minus baseline.

    Attributes:
        task: Name of the task.
        column: Name that tables show.
        suite: Suite it belongs to.
        protocol: How it was asked and scored.
        metric: Its main metric.
        statistic: How the score comes out of the documents.
        judged: Whether a judge scored the answers.
        part: Columns that are averaged by themselves too.
        pictures: What the pictures are recognised by, where columns are known to share them.
        version: Version of the task.
        higher_is_better: Direction of the metric.
        scale: Highest score of a document, 1 or 100.
        is_paired: Whether documents could be compared one by one.
        reason: Why not.
        missing: Why a run has no score at all.
        baseline: Score of the first system on the documents used, the mean over its runs.
        candidate: Score of the second system on them.
        difference: Candidate minus baseline; None if a system has no score.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end of it.
        p_value: Two-sided p of this column alone.
        p_holm: The same, adjusted for the number of columns.
        test: How the p-value was found.
        verdict: What may be concluded, after adjustment.
        detectable: Smallest true difference that this sample finds with 80 % power.
        n: Documents used.
        clusters: Independent groups among them.
        dropped: Documents left out because a run has no answer or no score for them.
        answers_changed: Pairs of answers with different text.
        improved: Documents whose score moved in the good direction.
        worsened: Documents whose score moved in the bad direction.
        seeds: Spread between the runs of several seeds.
        note: A warning about a small or degenerate sample.
        bounded: Whether all scores lie between 0 and `scale`.
        draws: Bootstrap differences, for averages over columns.
        changed_clusters: Clusters whose score changed.
        pulls: Effect of each picture on the difference, for averages over columns.
    """

    task: str
    column: str
    suite: str | None
    protocol: str
    metric: str
    statistic: str
    judged: bool
    part: str | None
    version: str | int | float | None
    higher_is_better: bool
    scale: int
    is_paired: bool
    reason: str | None
    missing: str | None
    baseline: float | None
    candidate: float | None
    difference: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    test: Test | None = None
    verdict: Verdict = "cannot tell"
    detectable: float | None = None
    n: int = 0
    clusters: int = 0
    dropped: tuple[int, ...] = ()
    answers_changed: int = 0
    improved: Flips = field(default_factory=Flips)
    worsened: Flips = field(default_factory=Flips)
    seeds: SeedSpread | None = None
    note: str | None = None
    bounded: bool = True
    draws: Array | None = field(default=None, repr=False, compare=False)
    changed_clusters: int = 0
    pictures: str | None = field(default=None, repr=False)
    pulls: Pulls = field(default_factory=dict, repr=False, compare=False)

    def with_verdict(self, p_holm: float | None, verdict: Verdict) -> ColumnComparison:
        """Add what depends on the other columns."""
        return replace(self, p_holm=p_holm, verdict=verdict)

    def to_json(self) -> dict[str, Any]:
        """Write the column as JSON values."""
        hidden = {"draws", "changed_clusters", "bounded", "is_paired", "pictures", "pulls"}
        content = {key: value for key, value in vars(self).items() if key not in hidden}
        return {
            **content,
            "paired": self.is_paired,
            "dropped": list(self.dropped),
            "improved": self.improved.to_json(),
            "worsened": self.worsened.to_json(),
            "seeds": seeds_json(self.seeds),
        }


def seeds_json(spread: SeedSpread | None) -> dict[str, Any] | None:
    """Write the spread between seeds as JSON values."""
    if spread is None:
        return None
    return {**asdict(spread), "differences": list(spread.differences)}


def compare_column(
    task: str,
    runs: Sequence[tuple[Results, Results]],
    *,
    resamples: int,
    seed: np.random.SeedSequence,
) -> ColumnComparison:
    """Compare one task of two systems that took the same test.

    Args:
        task: The task.
        runs: A run of each system, one pair for each seed.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        EvaluationError: If the sample files of a pair do not hold the same documents.
    """
    entries = [(first.columns[task], second.columns[task]) for first, second in runs]
    pairs = [pair_rows(task, first, second) for first, second in runs]
    is_one_test = len({before["dataset_fingerprint"] for before, _ in entries}) == 1
    bare = _bare_column(task, entries=entries, pairs=pairs, is_one_test=is_one_test)
    if bare.reason is not None:
        return bare
    used = [usable_pairs(seed_pairs, bare.statistic) for seed_pairs in pairs]
    if not all(used):
        return replace(bare, is_paired=False, n=0, reason="no document was answered by both runs")
    lost = _lost_groups(pairs, used, bare.statistic)
    if lost:
        reason = f"no document of {', '.join(lost)} was answered by both runs"
        return replace(bare, is_paired=False, reason=reason)
    strata = make_strata(used, bare.statistic, bare.scale)
    found = compare_measures(strata, top=_top(bare, used), resamples=resamples, seed=seed)
    scores = [
        (_mean_value(stratum.baseline, stratum), _mean_value(stratum.candidate, stratum))
        for stratum in strata
    ]
    shares = [len(stratum.baseline) / len(used) for stratum in strata]
    spread = seed_spread(
        [
            measure_value(after, stratum.clusters) - measure_value(before, stratum.clusters)
            for stratum in strata
            for before, after in zip(stratum.baseline, stratum.candidate, strict=True)
        ]
    )
    gains = document_gains(used, bare.statistic, is_one_test=is_one_test)
    sign = 1.0 if bare.higher_is_better else -1.0
    return replace(
        bare,
        baseline=float(np.dot(shares, [before for before, _ in scores])),
        candidate=float(np.dot(shares, [after for _, after in scores])),
        difference=found.difference,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        test=found.test,
        detectable=found.detectable,
        n=_count(used, is_one_test=is_one_test),
        clusters=found.clusters,
        dropped=_dropped(pairs, used),
        improved=_flips(gains, sign, is_one_test=is_one_test),
        worsened=_flips(gains, -sign, is_one_test=is_one_test),
        seeds=spread,
        note=_note(found.note, spread),
        bounded=bare.statistic != MEAN or _is_bounded(used, bare.scale),
        draws=found.draws,
        changed_clusters=found.changed_clusters,
        pulls=picture_pulls(used, strata, float(bare.scale)),
    )


def _bare_column(
    task: str,
    *,
    entries: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    pairs: Sequence[Sequence[Pair]],
    is_one_test: bool,
) -> ColumnComparison:
    """Return what is known without any statistics."""
    both = [entry for pair in entries for entry in pair]
    scores = [[finite(entry["score"]) for entry in side] for side in zip(*entries, strict=True)]
    baseline, candidate = (_mean(side) for side in scores)
    missing = next((str(entry["missing"]) for entry in both if entry["missing"]), None)
    reason = missing or next((str(entry["reason"]) for entry in both if entry["reason"]), None)
    # A score of exactly 0 fits both scales; the other runs know which one it is.
    scales = {int(entry["scale"]) for entry in both if entry["score"]}
    if reason is None and len(scales) > 1:
        reason = "the runs report scores on different scales"
    answered = [
        [pair for pair in seed_pairs if not (pair[0].failed or pair[1].failed)]
        for seed_pairs in pairs
    ]
    known = baseline is not None and candidate is not None
    entry = both[0]
    return ColumnComparison(
        task=task,
        column=entry["column"],
        suite=entry["suite"],
        protocol=entry["protocol"],
        metric=entry["metric"],
        statistic=entry["statistic"],
        judged=entry["judged"],
        part=entry.get("part"),
        pictures=entry.get("pictures") or name_clusters(pairs),
        version=entry["version"],
        higher_is_better=bool(entry["higher_is_better"]),
        scale=max(scales, default=int(entry["scale"])),
        is_paired=reason is None,
        reason=reason,
        missing=missing,
        baseline=baseline,
        candidate=candidate,
        difference=candidate - baseline if known else None,  # type: ignore[operator]
        n=_count(answered, is_one_test=is_one_test),
        clusters=len({row.cluster for seed_pairs in answered for row, _ in seed_pairs}),
        dropped=_dropped(pairs, answered),
        answers_changed=sum(
            row.answer != other.answer for seed_pairs in answered for row, other in seed_pairs
        ),
    )


def _count(used: Sequence[Sequence[Pair]], *, is_one_test: bool) -> int:
    ids = [row.doc_id for pairs in used for row, _ in pairs]
    return len(set(ids)) if is_one_test else len(ids)


def _dropped(pairs: Sequence[Sequence[Pair]], used: Sequence[Sequence[Pair]]) -> tuple[int, ...]:
    lost: set[int] = set()
    for all_pairs, kept in zip(pairs, used, strict=True):
        lost |= {row.doc_id for row, _ in all_pairs} - {row.doc_id for row, _ in kept}
    return tuple(sorted(lost))


def _lost_groups(
    pairs: Sequence[Sequence[Pair]], used: Sequence[Sequence[Pair]], statistic: str
) -> tuple[str, ...]:
    found = [
        group
        for every, kept in zip(pairs, used, strict=True)
        for group in lost_groups(statistic, (row for row, _ in every), (row for row, _ in kept))
    ]
    return tuple(dict.fromkeys(found))


def _mean_value(measures: Sequence[Measure], stratum: Stratum) -> float:
    return float(np.mean([measure_value(measure, stratum.clusters) for measure in measures]))


def _top(column: ColumnComparison, used: Sequence[Sequence[Pair]]) -> float:
    """Return how far a score can move."""
    if column.statistic != MEAN:
        return 100.0 if column.statistic in RATIOS else float(column.scale)
    scores = [abs(row.score or 0.0) for pairs in used for pair in pairs for row in pair]
    return max(float(column.scale), *scores)


def _is_bounded(used: Sequence[Sequence[Pair]], scale: int) -> bool:
    return all(
        0.0 <= (row.score or 0.0) <= scale for pairs in used for pair in pairs for row in pair
    )


def _flips(gains: Mapping[tuple[int, int], float], sign: float, *, is_one_test: bool) -> Flips:
    moved = [doc_id for (_, doc_id), gain in gains.items() if gain * sign > 0.0]
    return Flips(len(moved), tuple(moved) if is_one_test else ())


def _note(note: str | None, spread: SeedSpread | None) -> str | None:
    # Without any spread there is nothing to warn of.
    if spread is None or spread.std == 0.0 or not spread.low <= 0.0 <= spread.high:
        return note
    remark = (
        f"the {spread.count} seeds spread so far that their own interval includes 0: another "
        "training run may turn out otherwise."
    )
    return remark if note is None else f"{note} {remark[0].upper()}{remark[1:]}"


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None
