"""What a comparison found, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from kuea_mllm.reporting.text import percent, plural, points
from kuea_mllm.reporting.view import NOT_TESTED, VERDICTS, ColumnView, ComparisonView

_NAMED_COLUMNS = 3
_FOUND = {"better": "better", "worse": "worse", "cannot tell": "cannot be told apart"}


def headline(view: ComparisonView) -> str:
    """Say in one sentence what a comparison found, and no more than that."""
    if not view.columns:
        return "Nothing was compared: the two results have no column in common."
    tested = [column for column in view.columns if column.verdict != NOT_TESTED]
    if not tested:
        return "Nothing was tested: none of the columns is paired."
    better, worse, unclear = ([c for c in tested if c.verdict == verdict] for verdict in VERDICTS)
    if len(unclear) == len(tested):
        return _null_headline(view, tested)
    parts = []
    if unclear:
        parts.append(f"{plural(len(unclear), 'column')} cannot be told apart")
    for verdict, found in (("better", better), ("worse", worse)):
        if found:
            be = "is" if len(found) == 1 else "are"
            noun = str(len(found)) if parts else plural(len(found), "column")
            parts.append(f"{noun} {be} {verdict} ({_named(found)})")
    return ", ".join(parts) + "."


def power_remark(view: ComparisonView) -> str:
    """Say which differences the columns that cannot be told apart may still hide."""
    open_columns = [c for c in view.columns if c.verdict == "cannot tell" and c.has_interval]
    if not open_columns:
        return ""
    low = min(c.low for c in open_columns if c.low is not None)
    high = max(c.high for c in open_columns if c.high is not None)
    text = (
        "“Cannot tell” does not mean equal: the intervals of these columns still allow "
        f"differences from {points(low)} to {points(high)} points."
    )
    known = [c.detectable for c in open_columns if c.detectable is not None]
    if known:
        smallest, largest = percent(min(known)), percent(max(known))
        span = smallest if smallest == largest else f"{smallest} to {largest}"
        text += (
            f" With this many questions, only differences of {span} points or more "
            "would be seen four times out of five."
        )
    return text


def average_sentence(view: ComparisonView) -> str:
    """Say what the averages over the columns did; empty if there is none."""
    parts = [
        f"{start}: {row.difference_text} points, {_FOUND[row.verdict]}."
        for start, row in (
            ("Average over the columns", view.average),
            ("Without those that a judge scored", view.average_unjudged),
        )
        if row is not None
    ]
    return " ".join(parts)


def _null_headline(view: ComparisonView, columns: Sequence[ColumnView]) -> str:
    if len(columns) == 1:
        return f"No difference could be shown in the one column tested ({_named(columns)})."
    text = f"No difference could be shown in any of the {len(columns)} columns tested"
    average = view.average
    if average is None or average.verdict == "cannot tell":
        return f"{text}."
    found = f"{average.verdict} ({average.difference_text} points)"
    return f"{text} by itself, but their average is {found}."


def _named(columns: Sequence[ColumnView]) -> str:
    ranked = sorted(columns, key=lambda column: -abs(column.difference or 0.0))
    if len(ranked) <= _NAMED_COLUMNS:
        ranked = list(columns)
    named = [f"{c.task} {c.difference_text}" for c in ranked[:_NAMED_COLUMNS]]
    opening = "largest: " if len(columns) > _NAMED_COLUMNS else ""
    return f"{opening}{', '.join(named)} points"
