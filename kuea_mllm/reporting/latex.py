"""Tables for LaTeX (packages booktabs and adjustbox), in ASCII: every engine reads them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
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
    '"': "{''}",
    "`": r"\textasciigrave{}",
}
_GREEK = {
    "\u03b1": "alpha",
    "\u03b2": "beta",
    "\u03b3": "gamma",
    "\u03b4": "delta",
    "\u03b5": "epsilon",
    "\u03bb": "lambda",
    "\u03bc": "mu",
    "\u03c1": "rho",
    "\u03c3": "sigma",
    "\u03c4": "tau",
}
_SYMBOLS = {
    "–": "--",  # noqa: RUF001 - a dash, meant as one
    "—": "---",
    "‘": r"\textquoteleft{}",  # noqa: RUF001
    "’": r"\textquoteright{}",  # noqa: RUF001
    "“": r"\textquotedblleft{}",
    "”": r"\textquotedblright{}",
    "…": r"\ldots{}",
    "−": "$-$",  # noqa: RUF001
    "±": r"$\pm$",
    "×": r"$\times$",  # noqa: RUF001
    "·": r"$\cdot$",
    "→": r"$\to$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "°": r"$^{\circ}$",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",  # noqa: RUF001
    "µ": r"$\mu$",
    **{letter: f"$\\{name}$" for letter, name in _GREEK.items()},
}
# Accents that every font encoding has, by the combining character.
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}
# Two of these in a row would be set as one other character.
_LIGATURE = re.compile(r"([-',])(?=\1)")


def comparison_latex(comparison: Mapping[str, Any]) -> str:
    """Return one table for each candidate; differences that are significant are bold.

    Characters that plain LaTeX has no command for are given by their number: `[U+4E2D]`.
    """
    return "\n\n".join(_table(view) for view in parse_comparisons(comparison)) + "\n"


def _table(view: ComparisonView) -> str:
    header = rows.header(view)
    seeds = rows.seed_rows(view)
    lines = [
        "% needs \\usepackage{booktabs,adjustbox}",
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{_escape(rows.title(view))}. {_escape(headline(view))} "
        f"{_escape(rows.caption(view))} Bold: significant.}}",
        *_tabular(
            f"ll{'r' * (len(header) - 3)}l",
            _line(map(_escape, header)),
            [_row(column, view) for column in view.columns],
            [_row(column, view) for column in view.averages],
        ),
        *(["", r"  \medskip", *_seeds_tabular(seeds)] if seeds else []),
        *(f"  % {one_line(remark)}" for remark in (*view.remarks, *view.notes)),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _seeds_tabular(found: Sequence[Sequence[str]]) -> list[str]:
    return _tabular(
        "lrrrrr",
        _line(map(_escape, rows.SEED_HEADER)),
        [_line([_escape(row[0]), *map(_cell, row[1:])]) for row in found],
    )


def _tabular(
    columns: str, header: str, body: Sequence[str], averages: Sequence[str] = ()
) -> list[str]:
    """Return a tabular, made smaller where it is wider than the page."""
    return [
        r"  \begin{adjustbox}{max width=\linewidth}",
        f"  \\begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        header,
        r"    \midrule",
        *body,
        *([r"    \midrule", *averages] if averages else []),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"  \end{adjustbox}",
    ]


def _row(column: ColumnView, view: ComparisonView) -> str:
    texts = rows.cells(column, view)
    cells = [*map(_escape, texts[: rows.FIRST_NUMBER]), *map(_cell, texts[rows.FIRST_NUMBER :])]
    if column.verdict in ("better", "worse"):
        cells[_DIFFERENCE] = f"\\textbf{{{cells[_DIFFERENCE]}}}"
    return _line(cells)


def _line(cells: Iterable[str]) -> str:
    line = " & ".join(cells)
    # The end of the row before, or a rule, would take a bracket or a star as its own.
    guard = "{}" if line.startswith(("[", "*")) else ""
    return f"    {guard}{line} \\\\"


def _cell(text: str) -> str:
    """Escape the text of a number, whose hyphen is a minus sign."""
    return re.sub(r"-(?=\d)", "$-$", _escape(text))


def _escape(text: str) -> str:
    parted = _LIGATURE.sub("\\1\0", one_line(unicodedata.normalize("NFC", text)))
    return "".join(_character(character) for character in parted)


def _character(character: str) -> str:
    if character == "\0":  # put between what must not be joined
        return "{}"
    if (known := _SPECIAL.get(character) or _SYMBOLS.get(character)) is not None:
        return known
    if character.isascii():
        return character
    if unicodedata.category(character) == "Cf":  # invisible: directions, joiners
        return ""
    # More than one accent on a letter is more than every encoding can set.
    parts = unicodedata.normalize("NFD", character)
    letter, marks = parts[0], parts[1:]
    if letter.isascii() and letter.isalpha() and marks in _ACCENTS:
        return f"\\{_ACCENTS[marks]}{{{letter}}}"
    return f"[U+{ord(character):04X}]"
