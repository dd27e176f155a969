"""Tables for the terminal.

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

from kuea_mllm.reporting import rows
from kuea_mllm.reporting.sentences import average_sentence, headline, power_remark
from kuea_mllm.reporting.text import one_line, value_text
from kuea_mllm.reporting.view import ComparisonView, parse_comparison

NARROW_COLUMNS = 80
WIDE_COLUMNS = 100
ALL_COLUMNS = 140
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
        yield _comparison_table(self.view, width=options.max_width)


class _Caption:
    """What the columns mean that there is room for."""

    def __init__(self, view: ComparisonView) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_narrow = options.max_width < ALL_COLUMNS
        yield Text(rows.caption(self.view, is_narrow=is_narrow), style="dim")


def comparison_table(comparison: Mapping[str, Any]) -> ComparisonTable:
    """Make the table of a comparison; print it with a rich console."""
    return ComparisonTable(comparison)


def comparison_text(comparison: Mapping[str, Any]) -> Group:
    """Make the whole terminal answer: what was found, the table, what to keep in mind.

    Several candidates follow one another.
    """
    parts: list[Any] = []
    pairs = comparison.get("pairs") or [comparison]
    for pair in pairs:
        view = parse_comparison(pair)
        parts.extend([Text()] if parts else [])
        if len(pairs) > 1:
            parts.append(Text(rows.title(view), style="bold underline"))
        parts.append(Text(headline(view), style="bold"))
        if sentence := average_sentence(view):
            parts.append(Text(sentence))
        parts.extend([Text(), ComparisonTable(pair), Text()])
        if (seeds := _seed_table(view)) is not None:
            parts.extend([seeds, Text()])
        if remark := power_remark(view):
            parts.append(Text(remark))
        if view.protocols:
            parts.append(_Caption(view))
        parts.extend(Text(f"Note: {remark}") for remark in (*view.remarks, *view.notes))
    return Group(*parts)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Make the table of one results directory from its `summary.json`."""
    table = _table(f"Results of {_model_name(summary)}")
    _add_names(table, ("column", "metric"))
    _add_numbers(table, ("n", "score", "std. error", "failed"))
    for row in rows.summary_rows(summary):
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
    """Print the table of one results directory, and why scores are missing."""
    console = Console()
    console.print(summary_table(summary))
    for remark in rows.summary_remarks(summary):
        console.print(Text(f"Note: {remark}"))


def print_key_values(title: str, items: Mapping[str, object]) -> None:
    """Print a panel of names and values."""
    Console().print(key_values(title, list(items.items())))


def _comparison_table(view: ComparisonView, *, width: int) -> Table:
    table = _table("")
    names = rows.header(view)
    if width < ALL_COLUMNS:
        names = rows.narrow(names)
    is_wide = width >= WIDE_COLUMNS
    _add_names(table, names[:2] if is_wide else (", ".join(names[:2]),))
    _add_numbers(table, [name.replace(" [", "\n[").replace(" (", "\n(") for name in names[2:-1]])
    table.add_column(names[-1], no_wrap=True)
    for number, column in enumerate(view.rows):
        if number == len(view.columns):
            table.add_section()
        texts = rows.cells(column, view)
        if width < ALL_COLUMNS:
            texts = rows.narrow(texts)
        if is_wide:
            cells = [Text(text) for text in texts]
        else:
            task, metric, *numbers, verdict = texts
            label = Text.assemble(task, "\n", (metric, "dim"))
            # From 80 columns on there is room for "cannot tell" in one line.
            shown = verdict if width >= NARROW_COLUMNS else verdict.replace(" ", "\n")
            cells = [label, *map(Text, numbers), Text(shown)]
        cells[-1].stylize(_STYLES[column.verdict])
        table.add_row(*cells)
    return table


def _seed_table(view: ComparisonView) -> Table | None:
    found = rows.seed_rows(view)
    if not found:
        return None
    table = _table("Between seeds")
    name, *names = rows.SEED_HEADER
    _add_names(table, (name,))
    table.add_column(names[0], justify="right", no_wrap=True)
    table.add_column(names[1], justify="right", overflow="fold")
    _add_numbers(table, names[2:])
    for row in found:
        table.add_row(*map(Text, row))
    return table


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
