"""The report of one results directory: scores, what was asked, questions to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.io import read_json
from kuea_mllm.reporting import rows
from kuea_mllm.reporting.blocks import (
    Block,
    Details,
    Gallery,
    KeyValues,
    Paragraph,
    Report,
    Section,
    Table,
    Tiles,
    Tone,
)
from kuea_mllm.reporting.examples import State, show_examples
from kuea_mllm.reporting.html import write_report
from kuea_mllm.reporting.paper import OwnScores, paper_section
from kuea_mllm.reporting.provenance import models_blocks
from kuea_mllm.reporting.run_sections import (
    asked_section,
    column_name,
    groups_section,
    is_share,
    percent_of,
    score_figure_blocks,
    score_text,
)
from kuea_mllm.reporting.text import count, one_line, plural

REPORT = "report.html"
"""Its name inside of the results directory."""

_SHOWN = 3
_TILES = 4
_KINDS: tuple[tuple[State, str], ...] = (
    ("wrong", "Wrong or partly wrong"),
    ("right", "Right"),
    ("scored", "Answers and their scores"),
    ("failed", "Not scored"),
)


def write_results_report(path: Path, results_dir: Path) -> None:
    """Write the report of one results directory as one HTML file.

    Args:
        path: File to write, such as `report.html` in the results directory.
        results_dir: What `kuea-mllm eval` wrote.

    Raises:
        EvaluationError: If a sample file is not readable.
        EnvironmentFailure: If the disk is full.
    """
    write_report(path, results_report(results_dir))


def results_report(results_dir: Path) -> Report:
    """Build the report of one results directory."""
    results_dir = Path(results_dir)
    summary: Mapping[str, Any] = read_json(results_dir / "summary.json")
    model = summary.get("model") or {}
    name = one_line(model.get("name") or model.get("path") or results_dir.name)
    figures = score_figure_blocks(*_series(summary, name))
    found = [
        Section("Scores", [_scores_table(summary), *_remarks(summary), *figures]),
        paper_section([OwnScores(name, [summary])]),
        groups_section([(name, [summary])]),
        _questions_section(results_dir, summary, name),
        asked_section([(name, summary)]),
        Section("The model", models_blocks([(name, summary)])),
        Section("Where this comes from", [KeyValues([("results", str(results_dir))])]),
    ]
    return Report(
        title=f"Evaluation of {name}",
        subtitle=one_line(summary.get("created") or ""),
        summary=_summary(summary),
        sections=[section for section in found if section is not None],
    )


def _summary(summary: Mapping[str, Any]) -> list[Block]:
    entries = list(summary["columns"].values())
    scored = [entry for entry in entries if entry.get("score") is not None]
    questions = sum(int(entry.get("n") or 0) for entry in entries)
    failed = sum(int(entry.get("failed") or 0) for entry in entries)
    text = f"{plural(len(scored), 'column')} scored on {count(questions)} questions"
    missing = [column_name(entry) for entry in entries if entry.get("score") is None]
    text += f"; missing: {', '.join(missing)}." if missing else "."
    if failed:
        text += f" {count(failed)} questions got no answer."
    if len(scored) > _TILES:
        return [Paragraph(text, "lead")]
    tiles: list[tuple[str, str, Tone]] = [
        (score_text(entry), column_name(entry), "plain") for entry in scored
    ]
    return [Paragraph(text, "lead"), Tiles(tiles)]


def _scores_table(summary: Mapping[str, Any]) -> Table:
    return Table(
        caption="Scores in percent, with standard errors that allow for questions about the same "
        "picture.",
        header=("Column", "Score", "Std. error", "Questions", "Not answered", "Metric"),
        rows=[
            [column, score, error, number, failed, metric]
            for column, metric, number, score, error, failed in rows.summary_rows(summary)
        ],
        numeric=frozenset(range(1, 5)),
    )


def _remarks(summary: Mapping[str, Any]) -> list[Paragraph]:
    return [Paragraph(f"{remark}.", "note") for remark in rows.summary_remarks(summary)]


def _series(
    summary: Mapping[str, Any], name: str
) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    entries = list(summary["columns"].values())
    scores = [percent_of(entry) if is_share(entry) else None for entry in entries]
    return [column_name(entry) for entry in entries], [(name, scores)]


def _questions_section(results_dir: Path, summary: Mapping[str, Any], name: str) -> Section | None:
    parts = []
    for task, entry in summary["columns"].items():
        blocks: list[Block] = []
        # One gallery is open, so that there is something to see; the others are folded.
        for kind, heading in _KINDS:
            picked = show_examples(results_dir, task, number=_SHOWN, kind=kind)
            if picked and not blocks:
                blocks += [Paragraph(heading), Gallery(picked, name)]
            elif picked:
                blocks.append(Details(f"{heading}, {column_name(entry)}", [Gallery(picked, name)]))
        if blocks:
            parts.append(Section(column_name(entry), blocks))
    if not parts:
        return None
    note = (
        "Which questions are shown follows from a hash of their names, those with a picture "
        "first. How often each kind occurs is in the table above, not here."
    )
    return Section("Questions to look at", [Paragraph(note, "note")], parts)
