"""Markdown and LaTeX: the numbers of the terminal, escaped for where they go."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from reporting_samples import (
    AVERAGE,
    UNPAIRED,
    full_comparison,
    make_column,
    make_comparison,
    make_summary,
)
from rich.console import Console

from kuea_mllm.reporting import rows
from kuea_mllm.reporting.latex import comparison_latex
from kuea_mllm.reporting.markdown import (
    comparison_markdown,
    key_values_markdown,
    summary_markdown,
)
from kuea_mllm.reporting.tables import comparison_text
from kuea_mllm.reporting.view import parse_comparison

SEEDS = {"count": 3, "differences": [0.01, 0.03, 0.05], "std": 0.02, "low": -0.02, "high": 0.08}


def rich_comparison() -> dict[str, Any]:
    comparison = full_comparison()
    comparison["columns"]["miniworld_textvqa"] |= {"seeds": SEEDS, "protocol": "paper"}
    comparison["columns"]["wild"] = make_column(
        "wild",
        column="llava-wild",
        **UNPAIRED | {"baseline": None, "candidate": None, "difference": None},
        missing="no judge was given",
        judged=True,
    )
    comparison["settings"] |= {
        "protocols": ["paper"],
        "suite": "llava-paper",
        "limit": 256,
        "limit_seed": 7,
    }
    return comparison | {"average_unjudged": AVERAGE | {"difference": 0.0123}}


def terminal(comparison: dict[str, Any]) -> str:
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(comparison_text(comparison))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def markdown_cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [
        [cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")] for line in lines
    ]


def latex_cells(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines() if line.endswith(r"\\")]
    plain = [re.sub(r"\\textbf\{(.*?)\}", r"\1", line[:-2]) for line in lines]
    found = [re.sub(r"\\textless\{\}", "<", line).replace("$-$", "-") for line in plain]
    return [[cell.strip().replace("\\", "") for cell in line.split(" & ")] for line in found]


def test_all_formats_show_the_same_cells() -> None:
    comparison = rich_comparison()
    view = parse_comparison(comparison)
    expected = [rows.header(view), *(rows.cells(column, view) for column in view.rows)]
    expected += [list(rows.SEED_HEADER), *rows.seed_rows(view)]
    assert markdown_cells(comparison_markdown(comparison)) == expected
    assert latex_cells(comparison_latex(comparison)) == expected
    text = terminal(comparison)
    for row in [*expected[1:8], *expected[9:]]:
        pattern = r"\s+".join(re.escape(cell) for cell in row if cell)
        assert re.search(pattern, text), row


def test_caption_states_protocol_and_number_of_questions() -> None:
    view = parse_comparison(rich_comparison())
    caption = rows.caption(view)
    for part in (
        "Protocol: paper",
        "suite llava-paper",
        "n = 13,774 questions in 5 columns",
        "at most 256 per column, drawn with seed 7",
        "mean of 3 seeds",
        "95 % intervals",
        "exact McNemar",
    ):
        assert part in caption
    assert caption in comparison_markdown(rich_comparison())
    assert caption.replace("%", r"\%") in comparison_latex(rich_comparison())


def test_missing_column_is_said_and_is_no_zero() -> None:
    text = comparison_markdown(rich_comparison())
    (row,) = [cells for cells in markdown_cells(text) if cells[0] == "llava-wild"]
    assert row[3:7] == ["n/a"] * 4
    assert row[-1] == "missing"
    assert "llava-wild is missing: no judge was given" in text


def test_significant_differences_are_bold_in_latex() -> None:
    bold = re.findall(r"textbf\{(.*?)\}", comparison_latex(full_comparison()))
    assert bold == ["+3.4 [1.2, 5.6]", "$-$2.6 [$-$4.1, $-$1.1]"]


def test_foreign_names_are_escaped_everywhere() -> None:
    name = "a|b<script>\n# c_d & 5 % \\input{x} $y^2~\x1b[31m"
    comparison = make_comparison(make_column(name))
    assert "a\\|b\\<script\\> \\# c\\_d" in comparison_markdown(comparison)
    latex = comparison_latex(comparison)
    assert (
        r"a\textbar{}b\textless{}script\textgreater{} \# c\_d \& 5 \% \textbackslash{}input\{x\} "
        r"\$y\textasciicircum{}2\textasciitilde{}"
    ) in latex
    assert "\x1b" not in latex


def test_several_candidates_follow_one_another() -> None:
    second = full_comparison() | {"candidate": {"path": "/r/c", "model": {"name": "other"}}}
    content = {"kind": "comparisons", "schema_version": 1, "pairs": [full_comparison(), second]}
    text = comparison_markdown(content)
    assert re.findall("### (.*)", text) == [
        "llava-kuea against llava-stock",
        "other against llava-stock",
    ]
    assert comparison_latex(content).count(r"\begin{table}") == 2
    assert "other against llava-stock" in terminal(content)


@pytest.mark.parametrize("protocols", [["paper", "lmms-eval"], ["paper"]])
def test_protocols_of_a_mixed_table_stand_in_the_rows(protocols: list[str]) -> None:
    comparison = make_comparison(make_column("x", protocol="paper"))
    comparison["settings"]["protocols"] = protocols
    assert ("exact\\_match, paper" in comparison_markdown(comparison)) == (len(protocols) == 2)


def test_summary_markdown_and_key_values() -> None:
    assert "| 12,800 | 41.2 | 1.2 | 2 |" in summary_markdown(make_summary())
    assert key_values_markdown([("a_b", True)]) == "- **a\\_b**: yes\n"


def test_summary_of_a_column_without_score() -> None:
    summary = make_summary()
    column = summary["columns"]["miniworld_textvqa"]
    column |= {"score": None, "stderr": None}
    assert "| n/a | n/a | 2 |" in summary_markdown(summary)
    column |= {"missing": "no judge", "column": "wild"}
    assert "| wild | exact\\_match | 12,800 | missing | n/a | 2 |" in summary_markdown(summary)
    assert rows.summary_remarks(summary) == ["wild is missing: no judge"]


def test_notes_on_rows_are_in_every_format() -> None:
    comparison = full_comparison()
    note = "the 3 seeds spread so far that their own interval includes 0"
    comparison["columns"]["miniworld_textvqa"]["note"] = note
    for text in (
        terminal(comparison),
        comparison_markdown(comparison),
        comparison_latex(comparison),
    ):
        assert note in text
