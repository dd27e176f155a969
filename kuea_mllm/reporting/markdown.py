"""Tables as GitHub's Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kuea_mllm.reporting import rows
from kuea_mllm.reporting.sentences import average_sentence, headline, power_remark
from kuea_mllm.reporting.text import one_line, value_text
from kuea_mllm.reporting.view import ComparisonView, parse_comparisons


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """Return one or several comparisons: what was found, the table, what to keep in mind."""
    views = parse_comparisons(comparison)
    blocks: list[str] = []
    for view in views:
        if len(views) > 1:
            blocks.append(f"### {_escape(rows.title(view))}")
        blocks.extend(_blocks(view))
    return "\n\n".join(blocks) + "\n"


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """Return the results of one model as a table."""
    header = ["column", "metric", "n", "score", "std. error", "failed"]
    return _table(header, rows.summary_rows(summary), numeric=range(2, 6)) + "\n"


def key_values_markdown(items: Sequence[tuple[str, object]]) -> str:
    """Return names and values as a list."""
    lines = [f"- **{_escape(name)}**: {_escape(value_text(value))}" for name, value in items]
    return "\n".join(lines) + "\n"


def _blocks(view: ComparisonView) -> list[str]:
    header = rows.header(view)
    cells = [rows.cells(column, view) for column in view.rows]
    blocks = [
        _escape(headline(view)),
        _table(header, cells, numeric=range(rows.FIRST_NUMBER, len(header) - 1)),
        _escape(rows.caption(view)),
    ]
    if found := rows.seed_rows(view):
        blocks.append(_table(rows.SEED_HEADER, found, numeric=range(1, len(rows.SEED_HEADER))))
    blocks.extend(_escape(text) for text in (average_sentence(view), power_remark(view)) if text)
    if remarks := [*view.remarks, *view.notes]:
        blocks.append("\n".join(f"- {_escape(remark)}" for remark in remarks))
    return blocks


def _table(header: Sequence[str], body: Sequence[Sequence[str]], *, numeric: range) -> str:
    rule = ["---:" if index in numeric else "---" for index in range(len(header))]
    cells = [list(map(_escape, header)), rule, *([_escape(cell) for cell in row] for row in body)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _escape(text: str) -> str:
    escaped = one_line(text)
    for character in "\\`*_<>|[]#":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped
