"""The table of baseline, +align, +peft and +both, as Markdown, for reports and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table as TerminalTable
from rich.text import Text

from kuea_mllm.reporting.blocks import Block, Paragraph, Section, Table
from kuea_mllm.reporting.text import count

_MODELS = {"baseline": "baseline", "align": "+align", "peft": "+peft", "both": "+both"}
_COLUMNS = {
    "miniworld_pope": "existence",
    "miniworld_vqa": "count and colour",
    "miniworld_textvqa": "reading",
    "miniworld_refcoco": "boxes",
}


def peft_tables(record: Mapping[str, Any]) -> list[Table]:
    """Return scores, and differences with each kind of interval that there is.

    Args:
        record: `scores` and `differences`, from `workflows.studies.peft_scores.summarise_peft`.
    """
    worlds = _count_worlds(record)
    tables = [_scores(record, worlds)]
    if worlds > 1:
        tables.append(
            _differences(
                record,
                f"Differences in points, paired within a world; 95 % intervals over {worlds} "
                "worlds (Student's t), and in how many of them the difference is above zero.",
                lambda column: column,
                worlds,
            )
        )
    tables.append(
        _differences(
            record,
            "Differences in points, paired by question; 95 % intervals over the pictures "
            "(bootstrap): what other questions to the same models would show.",
            lambda column: {**column["questions"], "mean": column["mean"]},
        )
    )
    return tables


def peft_section(record: Mapping[str, Any]) -> Section:
    """Return the section of a report."""
    worlds = _count_worlds(record)
    blocks: list[Block] = [
        Paragraph(
            "+align: the aligned tower in place of the original, nothing trained. +peft: LoRA on "
            "the language model (and the projector trained) with the original tower. +both: the "
            "same LoRA training with the aligned tower: same conversations, same order, same start."
        ),
        *peft_tables(record),
    ]
    if worlds == 1:
        blocks.append(
            Paragraph(
                "One world, one training of each: what another training would give is not in the "
                "intervals. `kuea-mllm world peft` measures it over several worlds.",
                tone="note",
            )
        )
    else:
        blocks.append(
            Paragraph(
                "The intervals are not adjusted for their number: of twenty, one leaves out zero "
                "by chance.",
                tone="note",
            )
        )
    return Section("Alignment and LoRA", blocks)


def peft_markdown(record: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = []
    for table in peft_tables(record):
        rule = ["---", *("---:" for _ in table.header[1:])]
        rows = [table.header, rule, *table.rows]
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        parts.append("\n".join([table.caption, "", *lines]))
    return "\n\n".join(parts) + "\n"


def peft_text(record: Mapping[str, Any]) -> list[TerminalTable]:
    """Return all tables for the terminal."""
    shown = []
    for table in peft_tables(record):
        drawn = TerminalTable(title=Text(table.caption), title_justify="left")
        for number, name in enumerate(table.header):
            drawn.add_column(Text(name), justify="right" if number in table.numeric else "left")
        for row in table.rows:
            drawn.add_row(*(Text(str(cell)) for cell in row))
        shown.append(drawn)
    return shown


def _count_worlds(record: Mapping[str, Any]) -> int:
    return len(next(iter(record["scores"]["baseline"].values()))["per_seed"])


def _scores(record: Mapping[str, Any], worlds: int) -> Table:
    scores: Mapping[str, Mapping[str, Any]] = record["scores"]
    spread = "" if worlds == 1 else f", mean of {worlds} worlds"
    questions = (record.get("settings") or {}).get("questions")
    asked = "" if questions is None else f", n = {count(questions)} questions of each task"
    return _table(
        f"Scores in percent{spread}{asked}.",
        "model",
        scores["baseline"],
        {
            _MODELS[model]: [f"{column['mean']:.1f}" for column in columns.values()]
            for model, columns in scores.items()
        },
    )


def _differences(
    record: Mapping[str, Any],
    caption: str,
    choose: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    worlds: int | None = None,
) -> Table:
    rows = {}
    for found in record["differences"]:
        name = f"{_MODELS[found['model']]} vs {_MODELS[found['to']]}"
        rows[name] = [_cell(choose(column), worlds) for column in found["columns"].values()]
    return _table(caption, "models", record["scores"]["baseline"], rows)


def _cell(found: Mapping[str, Any], worlds: int | None) -> str:
    text = f"{found['mean']:+.1f}"
    if found["low"] is not None:
        text += f" [{found['low']:+.1f}, {found['high']:+.1f}]"
    if worlds is not None:
        # Means of the same scores in another order may differ by rounding.
        text += f" ({sum(change > 1e-9 for change in found['per_seed'])}/{worlds})"
    return text


def _table(
    caption: str, first: str, columns: Mapping[str, Any], rows: Mapping[str, list[str]]
) -> Table:
    header = (first, *(_COLUMNS.get(name, name) for name in columns))
    return Table(
        caption=caption,
        header=header,
        rows=[(name, *cells) for name, cells in rows.items()],
        numeric=frozenset(range(1, len(header))),
    )
