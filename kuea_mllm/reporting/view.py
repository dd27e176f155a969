"""A comparison as every table, figure and sentence shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.reporting.text import (
    grouped,
    interval,
    one_line,
    percent,
    plain,
    points,
)

VERDICTS = ("better", "worse", "cannot tell")
NOT_TESTED = "not tested"
MISSING = "missing"
_MOST_NAMED = 3


@dataclass(frozen=True)
class SeedsView:
    """Spread of a difference between seeds, as fractions.

    Args:
        count: Pairs of runs.
        differences: Difference of each.
        std: Standard deviation between them.
        low: Lower end of the t interval of their mean.
        high: Upper end.
    """

    count: int
    differences: Sequence[float]
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class ColumnView:
    """One column of a comparison; scores and differences as fractions (0.5 is 50 %).

    Args:
        task: Name of the column: the paper's where it has one, else the task's.
        metric: Name of the metric.
        n: Questions used.
        clusters: Groups of questions that share a picture.
        baseline: Score of the baseline; None if it has none.
        candidate: Score of the candidate; None if it has none.
        difference: Candidate minus baseline; None if either has no score.
        low: Lower end of the interval of the difference; None if the column is not paired.
        high: Upper end.
        p_holm: p-value, adjusted for the number of columns.
        verdict: `better`, `worse`, `cannot tell`, or `not tested` if the column is not paired.
        detectable: Smallest difference that this many questions would show, if known.
        improved: Questions that the candidate alone gets right.
        worsened: Questions that the baseline alone gets right.
        dropped: Questions left out because a model failed to answer.
        higher_is_better: Direction of the metric.
        is_share: Whether the scores are shares of a maximum; otherwise they are shown as they are.
        reason: Why the column is not paired; empty if it is.
        note: Further remark.
        protocol: How the column was asked and scored.
        missing: Why a model has no score; empty if both have one.
        judged: Whether a judge scored the answers.
        test: How the p-value was found.
        seeds: Spread between the runs of several seeds.
    """

    task: str
    metric: str
    n: int | None
    clusters: int | None
    baseline: float | None
    candidate: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_holm: float | None
    verdict: str
    detectable: float | None = None
    improved: int = 0
    worsened: int = 0
    dropped: int = 0
    higher_is_better: bool = True
    is_share: bool = True
    reason: str = ""
    note: str = ""
    protocol: str = ""
    missing: str = ""
    judged: bool = False
    test: str = ""
    seeds: SeedsView | None = None

    @property
    def verdict_text(self) -> str:
        """The verdict, or why there is none."""
        return MISSING if self.missing else self.verdict

    @property
    def detectable_text(self) -> str:
        """Smallest detectable difference in points."""
        return percent(self.detectable) if self.is_share else plain(self.detectable)

    @property
    def has_interval(self) -> bool:
        """Whether the difference has an interval."""
        return self.low is not None and self.high is not None

    @property
    def baseline_text(self) -> str:
        """Score of the baseline in percent."""
        return percent(self.baseline) if self.is_share else plain(self.baseline)

    @property
    def candidate_text(self) -> str:
        """Score of the candidate in percent."""
        return percent(self.candidate) if self.is_share else plain(self.candidate)

    @property
    def difference_text(self) -> str:
        """Difference in points with its interval: `+3.4 [1.2, 5.6]`."""
        if not self.is_share:
            return plain(self.difference, sign="+")
        if not self.has_interval:
            return points(self.difference)
        return f"{points(self.difference)} {interval(self.low, self.high)}"


@dataclass(frozen=True)
class ComparisonView:
    """A comparison of two results.

    Args:
        baseline: Name of the baseline.
        candidate: Name of the candidate; differs from `baseline`.
        columns: The columns in the order of the suite.
        average: Mean over columns, if there is one; its `p_holm` is not adjusted.
        level: Coverage of the intervals, such as 0.95.
        alpha: Level below which an adjusted p-value counts.
        remarks: Warnings, and what was left out.
        average_unjudged: The mean without judged columns, if there are any.
        part_averages: Means over parts of the columns, such as those of 4 shots.
        protocols: How the columns were asked and scored.
        suite: Suite that was run, if it was one.
        limit: Questions per column, if not all were asked.
        limit_seed: Seed by which they were drawn; None for the first ones.
        limit_spread: Whether they are spread evenly instead.
    """

    baseline: str
    candidate: str
    columns: Sequence[ColumnView]
    average: ColumnView | None
    level: float
    alpha: float
    remarks: Sequence[str]
    average_unjudged: ColumnView | None = None
    part_averages: Sequence[ColumnView] = ()
    protocols: Sequence[str] = ()
    suite: str = ""
    limit: int | None = None
    limit_seed: int | None = None
    limit_spread: bool = False

    @property
    def averages(self) -> list[ColumnView]:
        """The averages that there are."""
        found = (*self.part_averages, self.average, self.average_unjudged)
        return [row for row in found if row is not None]

    @property
    def rows(self) -> list[ColumnView]:
        """The columns, then the averages."""
        return [*self.columns, *self.averages]

    @property
    def notes(self) -> list[str]:
        """What is to be kept in mind about single rows: few images, seeds that disagree."""
        counts = Counter(column.note for column in self.columns)
        noted: dict[tuple[str, str], None] = {}
        for number, row in enumerate(self.rows):
            # All columns by name would be a list that says nothing.
            is_shared = number < len(self.columns) == counts[row.note] > _MOST_NAMED
            about = f"all {len(self.columns)} columns" if is_shared else row.task
            noted.setdefault((about, row.note))
        return grouped((about, note) for about, note in noted if note)

    @property
    def level_text(self) -> str:
        """Coverage of the intervals: `95 %`."""
        return f"{self.level * 100:g} %"


def parse_comparison(comparison: Mapping[str, Any]) -> ComparisonView:
    """Read the JSON form of a comparison.

    Raises:
        EvaluationError: If a key is missing, or a verdict is unknown.
    """
    try:
        settings = comparison["settings"]
        columns = _columns(list(comparison["columns"].values()))
        average, unjudged = (comparison.get(key) for key in ("average", "average_unjudged"))
        names = [_name(comparison[side]) for side in ("baseline", "candidate")]
        if names[0] == names[1]:
            names = [f"{names[0]} (baseline)", f"{names[1]} (candidate)"]
        return ComparisonView(
            baseline=names[0],
            candidate=names[1],
            columns=columns,
            average=_average(average, "average") if average else None,
            level=float(settings["level"]),
            alpha=float(settings["alpha"]),
            remarks=_remarks(comparison),
            average_unjudged=_average(unjudged, "without judged") if unjudged else None,
            part_averages=[
                _average(raw, _part_average(one_line(part)))
                for part, raw in (comparison.get("averages") or {}).items()
            ],
            protocols=[one_line(name) for name in settings.get("protocols") or ()],
            suite=one_line(settings.get("suite") or ""),
            limit=settings.get("limit"),
            limit_seed=settings.get("limit_seed"),
            limit_spread=bool(settings.get("limit_spread")),
        )
    except KeyError as error:
        raise EvaluationError(
            f"the comparison has no key {error}.",
            "Make it again with `kuea-mllm compare`.",
        ) from error


def parse_comparisons(content: Mapping[str, Any]) -> list[ComparisonView]:
    """Read the JSON form of one comparison or of several with one baseline.

    Raises:
        EvaluationError: If a key is missing, or a verdict is unknown.
    """
    return [parse_comparison(pair) for pair in content.get("pairs") or [content]]


def _columns(raw: Sequence[Mapping[str, Any]]) -> list[ColumnView]:
    columns = [_column(column) for column in raw]
    names = Counter(column.task for column in columns)
    # The same column by two protocols is two columns.
    return [
        replace(column, task=f"{column.task} ({column.protocol})")
        if names[column.task] > 1 and column.protocol
        else column
        for column in columns
    ]


def _column(raw: Mapping[str, Any]) -> ColumnView:
    scale = float(raw.get("scale") or 1)
    largest = max(abs(raw["baseline"] or 0.0), abs(raw["candidate"] or 0.0))
    # Totals such as MME's are no share of anything; a percentage of them would be nonsense. Scores
    # of a suite are known: CIDEr and ratios to a reference may exceed 100.
    is_share = largest <= scale * 1.0001 or bool(raw.get("suite"))
    divisor = scale if is_share else 1.0
    return ColumnView(
        task=one_line(raw.get("column") or raw["task"]),
        metric=one_line(raw["metric"]),
        n=raw.get("n"),
        clusters=raw.get("clusters"),
        baseline=_divide(raw["baseline"], divisor),
        candidate=_divide(raw["candidate"], divisor),
        difference=_divide(raw["difference"], divisor),
        low=_divide(raw.get("low"), divisor),
        high=_divide(raw.get("high"), divisor),
        p_holm=raw.get("p_holm"),
        verdict=_verdict(raw) if raw.get("paired", True) else NOT_TESTED,
        detectable=_divide(raw.get("detectable"), divisor),
        improved=(raw.get("improved") or {}).get("count", 0),
        worsened=(raw.get("worsened") or {}).get("count", 0),
        dropped=len(raw.get("dropped") or []),
        higher_is_better=bool(raw.get("higher_is_better", True)),
        is_share=is_share,
        reason=one_line(raw.get("reason") or ""),
        note=one_line(raw.get("note") or ""),
        protocol=one_line(raw.get("protocol") or ""),
        missing=one_line(raw.get("missing") or ""),
        judged=bool(raw.get("judged")),
        test=one_line(raw.get("test") or ""),
        seeds=_seeds(raw.get("seeds"), divisor),
    )


def _seeds(raw: Mapping[str, Any] | None, divisor: float = 1.0) -> SeedsView | None:
    if raw is None:
        return None
    return SeedsView(
        count=raw["count"],
        differences=[difference / divisor for difference in raw["differences"]],
        std=raw["std"] / divisor,
        low=raw["low"] / divisor,
        high=raw["high"] / divisor,
    )


def _average(raw: Mapping[str, Any], name: str) -> ColumnView:
    names = raw.get("columns") or []
    return ColumnView(
        task=name,
        metric=f"mean of {len(names)}",
        n=None,
        clusters=None,
        baseline=raw["baseline"],
        candidate=raw["candidate"],
        difference=raw["difference"],
        low=raw.get("low"),
        high=raw.get("high"),
        p_holm=raw.get("p_value"),
        verdict=_verdict(raw),
        note=one_line(raw.get("note") or ""),
        seeds=_seeds(raw.get("seeds")),
    )


def _part_average(part: str) -> str:
    return part if part.lower().startswith("average") else f"average, {part}"


def _verdict(raw: Mapping[str, Any]) -> str:
    verdict = str(raw["verdict"])
    if verdict not in VERDICTS:
        raise EvaluationError(
            f"the comparison holds the verdict {verdict!r}, expected one of {', '.join(VERDICTS)}."
        )
    return verdict


def _divide(value: float | None, divisor: float) -> float | None:
    return None if value is None else value / divisor


def _name(side: Mapping[str, Any]) -> str:
    model = side.get("model") or {}
    if side.get("label"):
        return one_line(side["label"])
    return one_line(model.get("name") or model.get("path") or side["path"])


def _remarks(comparison: Mapping[str, Any]) -> list[str]:
    remarks = [one_line(text) for text in comparison.get("warnings") or []]
    for side, tasks in (comparison.get("only_in") or {}).items():
        if tasks:
            remarks.append(f"Only the {side} has: {one_line(', '.join(tasks))}.")
    left_out: dict[str, list[str]] = {}
    for column in comparison["columns"].values():
        name = one_line(column.get("column") or column["task"])
        if column.get("missing"):
            left_out.setdefault(f"missing: {one_line(column['missing'])}", []).append(name)
        elif column.get("reason"):
            left_out.setdefault(f"not paired: {one_line(column['reason'])}", []).append(name)
    excluded = (comparison.get("average") or {}).get("excluded") or {}
    for task, reason in excluded.items():
        column = comparison["columns"].get(task) or {}
        if not column.get("reason"):
            name = one_line(column.get("column") or task)
            left_out.setdefault(f"not in the average: {one_line(reason)}", []).append(name)
    return [
        *remarks,
        *(
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {why}"
            for why, names in left_out.items()
        ),
    ]
