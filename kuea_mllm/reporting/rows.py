"""The cells of a comparison's tables: the same on the terminal, in Markdown and in LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kuea_mllm.reporting.text import count, interval, one_line, p_value, percent, plain, points
from kuea_mllm.reporting.view import ColumnView, ComparisonView

FIRST_NUMBER = 2
"""Columns of `header` before the first number; the last one is the verdict."""

SEED_HEADER = ("column", "seeds", "difference of each", "std", "mean", "95 % t interval")


def header(view: ComparisonView) -> list[str]:
    """Return the names of the table's columns."""
    difference = f"difference [{view.level_text} interval]"
    names = ("column", "metric", "n", "baseline", "candidate", difference, "p (Holm)")
    return [*names, "detectable", "won", "lost", "verdict"]


def cells(column: ColumnView, view: ComparisonView) -> list[str]:
    """Return one row of the table."""
    metric = column.metric if column.higher_is_better else f"{column.metric}, lower is better"
    if len(view.protocols) > 1 and column.protocol:
        metric = f"{metric}, {column.protocol}"
    is_average = column in view.averages
    return [
        column.task,
        metric,
        "" if column.n is None else count(column.n),
        column.baseline_text,
        column.candidate_text,
        column.difference_text,
        p_value(column.p_holm),
        "" if is_average else column.detectable_text,
        "" if is_average else count(column.improved),
        "" if is_average else count(column.worsened),
        column.verdict_text,
    ]


def seed_rows(view: ComparisonView) -> list[list[str]]:
    """Return the spread between seeds, one row for each column that has seeds."""
    return [
        [
            column.task,
            count(seeds.count),
            ", ".join(map(points, seeds.differences)),
            percent(seeds.std),
            points(sum(seeds.differences) / seeds.count),
            interval(seeds.low, seeds.high),
        ]
        for column in view.rows
        if (seeds := column.seeds) is not None
    ]


def title(view: ComparisonView) -> str:
    """Name the two models."""
    return f"{view.candidate} against {view.baseline}"


def caption(view: ComparisonView, *, is_narrow: bool = False) -> str:
    """Say what the numbers are: protocol, number of questions, how intervals were made."""
    names = " and ".join(view.protocols) or "not recorded"
    parts = [f"{'Protocols' if len(view.protocols) > 1 else 'Protocol'}: {names}"]
    if view.suite:
        parts.append(f"suite {view.suite}")
    known = [column.n for column in view.columns if column.n is not None]
    parts.append(f"n = {count(sum(known))} questions in {len(view.columns)} columns")
    if view.limit is not None:
        drawn = "the first" if view.limit_seed is None else f"drawn with seed {view.limit_seed}"
        drawn = "spread evenly" if view.limit_spread else drawn
        parts.append(f"at most {count(view.limit)} per column, {drawn}")
    seeds = {column.seeds.count for column in view.columns if column.seeds is not None}
    if seeds:
        parts.append(f"mean of {max(seeds)} seeds")
    tests = {column.test for column in view.columns} - {""}
    test = {"mcnemar": "exact McNemar", "bootstrap": "bootstrap"}
    tested = " or ".join(sorted(test.get(name, name) for name in tests))
    text = (
        f"{', '.join(parts)}. Scores in percent, differences in points with paired "
        f"{view.level_text} intervals (bootstrap over images); p: {tested or 'none'}, adjusted "
        "over the columns (Holm), not for averages"
    )
    more = (
        "; detectable: true difference that would be found four times out of five; won, lost: "
        "questions whose score rose or fell"
    )
    return f"{text}{'' if is_narrow else more}."


def summary_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of one results directory: column, metric, n, score, error, failed."""
    rows = []
    for column in summary["columns"].values():
        scale = float(column.get("scale") or 1)
        score, error = column["score"], column.get("stderr")
        is_share = abs(score or 0.0) <= scale * 1.0001 or bool(column.get("suite"))
        shown = _scaled(score, scale) if is_share else plain(score)
        rows.append(
            [
                one_line(column.get("column") or column["task"]),
                one_line(column["metric"]),
                count(column["n"]),
                "missing" if column.get("missing") else shown,
                _scaled(error, scale) if is_share else plain(error),
                count(column.get("failed", 0)),
            ]
        )
    return rows


def summary_remarks(summary: Mapping[str, Any]) -> list[str]:
    """Say why scores are missing, and what has to be known about others; the same only once."""
    missing: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for column in summary["columns"].values():
        name = one_line(column.get("column") or column["task"])
        if column.get("missing"):
            missing.setdefault(one_line(column["missing"]), []).append(name)
        for remark in column.get("remarks") or ():
            others.setdefault(one_line(remark), []).append(name)
    return [
        *(
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing: {why}"
            for why, names in missing.items()
        ),
        *(f"{', '.join(names)}: {remark}" for remark, names in others.items()),
    ]


def narrow(row: Sequence[str]) -> list[str]:
    """Leave out what 80 columns have no room for: detectable difference, won and lost."""
    return [*row[:7], row[-1]]


def _scaled(value: float | None, scale: float) -> str:
    return percent(None if value is None else value / scale)
