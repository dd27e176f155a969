"""Tables for LaTeX (package booktabs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kuea_mllm.reporting import rows
from kuea_mllm.reporting.sentences import headline
from kuea_mllm.reporting.text import one_line
from kuea_mllm.reporting.view import ColumnView, ComparisonView, parse_comparisons

_DIFFERENCE = 5
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
}


def comparison_latex(comparison: Mapping[str, Any]) -> str:
    """Return one table for each candidate; differences that are significant are bold."""
    return "\n\n".join(_table(view) for view in parse_comparisons(comparison)) + "\n"


def _table(view: ComparisonView) -> str:
    header = rows.header(view)
    body = [_row(column, view) for column in view.columns]
    averages = [_row(column, view) for column in view.averages]
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{_escape(rows.title(view))}. {_escape(headline(view))} "
        f"{_escape(rows.caption(view))} Bold: significant.}}",
        f"  \\begin{{tabular}}{{ll{'r' * (len(header) - 3)}l}}",
        r"    \toprule",
        f"    {' & '.join(map(_escape, header))} \\\\",
        r"    \midrule",
        *body,
        *([r"    \midrule", *averages] if averages else []),
        r"    \bottomrule",
        r"  \end{tabular}",
        *_seed_lines(view),
        *(f"  % {one_line(remark)}" for remark in (*view.remarks, *view.notes)),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _seed_lines(view: ComparisonView) -> list[str]:
    found = rows.seed_rows(view)
    if not found:
        return []
    return [
        "",
        r"  \medskip",
        r"  \begin{tabular}{lrrrrr}",
        r"    \toprule",
        f"    {' & '.join(map(_escape, rows.SEED_HEADER))} \\\\",
        r"    \midrule",
        *(f"    {_joined(row)} \\\\" for row in found),
        r"    \bottomrule",
        r"  \end{tabular}",
    ]


def _row(column: ColumnView, view: ComparisonView) -> str:
    texts = rows.cells(column, view)
    cells = [*map(_escape, texts[: rows.FIRST_NUMBER]), *map(_cell, texts[rows.FIRST_NUMBER :])]
    if column.verdict in ("better", "worse"):
        cells[_DIFFERENCE] = f"\\textbf{{{cells[_DIFFERENCE]}}}"
    return f"    {' & '.join(cells)} \\\\"


def _joined(texts: Sequence[str]) -> str:
    return " & ".join([_escape(texts[0]), *map(_cell, texts[1:])])


def _cell(text: str) -> str:
    """Escape the text of a number, whose hyphen is a minus sign."""
    escaped = _escape(text)
    for digit in "0123456789":
        escaped = escaped.replace(f"-{digit}", f"$-${digit}")
    return escaped


def _escape(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in one_line(text))
