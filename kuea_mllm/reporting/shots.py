"""Scores by number of demonstrations, in the form of the paper's Table 6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table as TerminalTable
from rich.text import Text

from kuea_mllm.reporting.blocks import Paragraph, Section, Table

Scores = Mapping[str, float]


def shots_table(record: Mapping[str, Any]) -> Table:
    """Return two towers at several numbers of shots, and their differences, for a report.

    Args:
        record: `models` (name -> shots -> task -> percent) and `differences` (shots -> task ->
            `difference`, `low`, `high` in points; the ends may be None).
    """
    header, rows = _comparison_rows(record)
    return Table(
        caption="Scores in percent by number of demonstrations. Differences in points, with 95 % "
        "intervals over questions: both towers answered the same questions after the same "
        "demonstrations.",
        header=header,
        rows=rows,
        numeric=frozenset(range(2, len(header))),
    )


def shots_section(record: Mapping[str, Any]) -> Section:
    """Return the same as a section of the quickstart's report."""
    return Section(
        "With and without demonstrations",
        [
            Paragraph(
                "A mini Flamingo, the classes of OpenFlamingo-3B with small numbers, was "
                "trained on the original tower; then only the tower was replaced. Zero shots "
                "are two demonstrations without their pictures, as in the published "
                "evaluation; captions are scored by the F1 of their words. Names are words "
                "without meaning that only demonstrations with pictures explain. One "
                "training, one seed of questions."
            ),
            Paragraph(
                "Flamingo reads the patch tokens of the last block, which the objective does "
                "not constrain, and nothing was trained after the swap: a loss is to be "
                "expected in a world this small, unlike in the paper's Table 6.",
                tone="note",
            ),
            shots_table(record),
        ],
    )


def shots_comparison_text(record: Mapping[str, Any]) -> TerminalTable:
    """Return the same for the terminal."""
    header, rows = _comparison_rows(record)
    return _terminal(header, rows)


def shots_text(scores: Mapping[str, Scores]) -> TerminalTable:
    """Return the scores of one model (shots -> task -> percent) for the terminal."""
    tasks = list(next(iter(scores.values())))
    rows = [(shots, *(f"{row[task]:.1f}" for task in tasks)) for shots, row in scores.items()]
    return _terminal(("shots", *tasks), rows)


def _comparison_rows(
    record: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    models: Mapping[str, Mapping[str, Scores]] = record["models"]
    first = next(iter(models.values()))
    tasks = list(next(iter(first.values())))
    rows: list[tuple[str, ...]] = []
    for shots in first:
        for name, scores in models.items():
            rows.append((shots, name, *(f"{scores[shots][task]:.1f}" for task in tasks)))
        found = record["differences"][shots]
        rows.append((shots, "difference", *(_difference(found[task]) for task in tasks)))
    return ("Shots", "Tower", *tasks), rows


def _difference(found: Mapping[str, float | None]) -> str:
    low, high = found["low"], found["high"]
    spread = "" if low is None or high is None else f" [{low:+.1f}, {high:+.1f}]"
    return f"{found['difference']:+.1f}{spread}"


def _terminal(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> TerminalTable:
    table = TerminalTable()
    for name in header:
        table.add_column(Text(name))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
