"""Tables for the terminal, and the same as Markdown.

At 80 columns no number is cut: the name of the metric moves below the name of the task, and only
names are folded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kuea_mllm.reporting.sentences import average_sentence, headline, power_remark
from kuea_mllm.reporting.text import count, one_line, p_value, percent, plain, value_text
from kuea_mllm.reporting.view import ColumnView, ComparisonView, parse_comparison

WIDE_COLUMNS = 100
_STYLES = {"better": "bold green", "worse": "bold red", "cannot tell": "dim", "not tested": "dim"}


class ComparisonTable:
    """A comparison that adapts to the width of the terminal.

    Args:
        comparison: The comparison's JSON form.

    Raises:
        EvaluationError: If the comparison is not complete.
    """

    def __init__(self, comparison: Mapping[str, Any]) -> None:
        self.view = parse_comparison(comparison)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for `console`; called by rich."""
        yield _comparison_table(self.view, is_wide=options.max_width >= WIDE_COLUMNS)


def comparison_table(comparison: Mapping[str, Any]) -> ComparisonTable:
    """Make the table of a comparison; print it with a rich console."""
    return ComparisonTable(comparison)


def comparison_text(comparison: Mapping[str, Any]) -> Group:
    """Make the whole terminal answer: what was found, the table, what to keep in mind."""
    view = parse_comparison(comparison)
    parts: list[Any] = [Text(headline(view), style="bold")]
    if sentence := average_sentence(view):
        parts.append(Text(sentence))
    parts.extend([Text(), ComparisonTable(comparison), Text()])
    if remark := power_remark(view):
        parts.append(Text(remark))
    parts.extend(Text(f"Note: {remark}") for remark in view.remarks)
    return Group(*parts)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Make the table of one results directory from its `summary.json`."""
    table = _table(f"Results of {_model_name(summary)}")
    _add_names(table, ("task", "metric"))
    _add_numbers(table, ("n", "score", "std. error", "failed"))
    for row in _summary_rows(summary):
        table.add_row(*(Text(cell) for cell in row))
    return table


def key_values(title: str, items: Sequence[tuple[str, object]]) -> Panel:
    """Make a panel of names and values."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", overflow="fold")
    grid.add_column(overflow="fold", ratio=1)
    for name, value in items:
        grid.add_row(Text(one_line(name)), Text(one_line(value_text(value))))
    return Panel(grid, title=Text(one_line(title)), title_align="left", box=box.ROUNDED)


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """Print what a comparison found."""
    Console().print(comparison_text(comparison))


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the table of one results directory."""
    Console().print(summary_table(summary))


def print_key_values(title: str, items: Mapping[str, object]) -> None:
    """Print a panel of names and values."""
    Console().print(key_values(title, list(items.items())))


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """Return a comparison as Markdown: what was found, the table, what to keep in mind."""
    view = parse_comparison(comparison)
    header = [
        "task",
        "metric",
        "n",
        "baseline",
        "candidate",
        f"difference [{view.level_text} interval]",
        "p (Holm)",
        "verdict",
    ]
    rows = [_cells(column) for column in view.rows]
    blocks = [_escape(headline(view)), _markdown_table(header, rows, numeric=range(2, 7))]
    blocks.extend(_escape(text) for text in (average_sentence(view), power_remark(view)) if text)
    if view.remarks:
        blocks.append("\n".join(f"- {_escape(remark)}" for remark in view.remarks))
    return "\n\n".join(blocks) + "\n"


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """Return the results of one model as a Markdown table."""
    header = ["task", "metric", "n", "score", "std. error", "failed"]
    return _markdown_table(header, _summary_rows(summary), numeric=range(2, 6)) + "\n"


def key_values_markdown(items: Sequence[tuple[str, object]]) -> str:
    """Return names and values as a Markdown list."""
    lines = [f"- **{_escape(name)}**: {_escape(value_text(value))}" for name, value in items]
    return "\n".join(lines) + "\n"


def _comparison_table(view: ComparisonView, *, is_wide: bool) -> Table:
    table = _table("")
    _add_names(table, ("task", "metric") if is_wide else ("task, metric",))
    difference = f"difference\n[{view.level_text} interval]"
    _add_numbers(table, ("n", "baseline", "candidate", difference, "p\n(Holm)"))
    table.add_column("verdict", no_wrap=True)
    for column in view.rows:
        if column is view.average:
            table.add_section()
        texts = _cells(column)
        if is_wide:
            cells = [Text(text) for text in texts]
        else:
            task, metric, *numbers, verdict = texts
            names = Text.assemble(task, "\n", (metric, "dim"))
            cells = [names, *map(Text, numbers), Text(verdict.replace(" ", "\n"))]
        cells[-1].stylize(_STYLES[column.verdict])
        table.add_row(*cells)
    return table


def _cells(column: ColumnView) -> list[str]:
    metric = column.metric if column.higher_is_better else f"{column.metric}, lower is better"
    return [
        column.task,
        metric,
        "" if column.n is None else count(column.n),
        column.baseline_text,
        column.candidate_text,
        column.difference_text,
        p_value(column.p_holm),
        column.verdict,
    ]


def _summary_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for column in summary["columns"].values():
        scale = float(column.get("scale") or 1)
        score, error = column["score"], column.get("stderr")
        is_share = abs(score or 0.0) <= scale * 1.0001
        rows.append(
            [
                one_line(column["task"]),
                one_line(column["metric"]),
                count(column["n"]),
                _scaled(score, scale) if is_share else plain(score),
                _scaled(error, scale) if is_share else plain(error),
                count(column.get("failed", 0)),
            ]
        )
    return rows


def _scaled(value: float | None, scale: float) -> str:
    return percent(None if value is None else value / scale)


def _model_name(summary: Mapping[str, Any]) -> str:
    model = summary.get("model") or {}
    return one_line(model.get("name") or model.get("path") or "a model")


def _table(title: str) -> Table:
    return Table(
        title=Text(title) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        # The rule of the header leaves one blank between columns, which is all 80 columns allow.
        padding=0,
        header_style="bold",
    )


def _add_names(table: Table, names: Sequence[str]) -> None:
    for name in names:
        table.add_column(name, overflow="fold", min_width=8)


def _add_numbers(table: Table, names: Sequence[str]) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: range) -> str:
    rule = ["---:" if index in numeric else "---" for index in range(len(header))]
    cells = [list(header), rule, *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _escape(text: str) -> str:
    escaped = one_line(text)
    for character in "\\`*_<>|[]#":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped
