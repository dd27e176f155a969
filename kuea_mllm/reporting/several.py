"""The report of several candidates against one baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kuea_mllm.reporting import rows
from kuea_mllm.reporting.blocks import (
    Block,
    Bullets,
    Cell,
    Figure,
    KeyValues,
    Paragraph,
    Report,
    Section,
    Table,
)
from kuea_mllm.reporting.pages import VERDICT_LOOKS, comparison_sections
from kuea_mllm.reporting.paper import OwnScores, paper_section
from kuea_mllm.reporting.provenance import models_blocks
from kuea_mllm.reporting.run_sections import (
    DASH,
    asked_section,
    groups_section,
    part_text,
    score_figure_blocks,
    seeds_section,
    view_series,
)
from kuea_mllm.reporting.sentences import headline
from kuea_mllm.reporting.view import ColumnView, ComparisonView, parse_comparison


def several_report(
    *,
    comparisons: Sequence[Mapping[str, Any]],
    baselines: Sequence[Mapping[str, Any]],
    candidates: Sequence[Sequence[Mapping[str, Any]]],
    extra_sections: Sequence[Section] = (),
    provenance: Sequence[tuple[str, str]] = (),
) -> Report:
    """Build the report of several candidates.

    Args:
        comparisons: JSON form of each candidate's comparison with the baseline.
        baselines: `summary.json` of the baseline, one for each seed.
        candidates: The same of each candidate, in the order of `comparisons`.
        extra_sections: Sections before the settings.
        provenance: Pairs of name and value.

    Raises:
        EvaluationError: If a comparison is not complete.
    """
    views = [parse_comparison(comparison) for comparison in comparisons]
    systems = [
        (views[0].baseline, baselines),
        *[(view.candidate, runs) for view, runs in zip(views, candidates, strict=True)],
    ]
    figures = score_figure_blocks(*view_series(views))
    repeated = ", ".join(f"{name} ({len(runs)})" for name, runs in systems if len(runs) > 1)
    means = f"Mean over the runs of a model, where it has several: {repeated}." if repeated else ""
    firsts = f"Of the first run of a model, where it has several: {repeated}." if repeated else ""
    found = [
        Section(
            "Scores",
            [
                differences_table(views),
                *_one_caption(views),
                Paragraph(
                    "Each candidate was compared with the baseline on the same questions; the "
                    "p-values behind the verdicts are adjusted for the columns of one comparison, "
                    "not for the number of candidates.",
                    "note",
                ),
                *_differences_figure(views),
            ],
            [Section("All models in one picture", figures)] if figures else [],
        ),
        _noted(paper_section([OwnScores(name, runs) for name, runs in systems]), means),
        _noted(groups_section(systems), means),
        Section(
            "Each candidate",
            sections=[
                _one(view, comparison) for view, comparison in zip(views, comparisons, strict=True)
            ],
        ),
        *extra_sections,
        _noted(asked_section([(name, runs[0]) for name, runs in systems]), firsts),
        Section("The models", models_blocks(_each_run(systems))),
        Section("Where this comes from", [KeyValues(provenance)]) if provenance else None,
    ]
    return Report(
        title="Several models against one baseline",
        subtitle=f"Baseline: {views[0].baseline}. "
        f"Candidates: {', '.join(view.candidate for view in views)}.",
        summary=[Bullets([f"{view.candidate}: {headline(view)}" for view in views])],
        sections=[section for section in found if section is not None],
    )


def _noted(section: Section | None, note: str) -> Section | None:
    """Begin a section by saying which runs its numbers are of."""
    if section is None or not note:
        return section
    return replace(section, blocks=[Paragraph(note, "note"), *section.blocks])


def _each_run(
    systems: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (name if len(runs) == 1 else f"{name}, run {number}", run)
        for name, runs in systems
        for number, run in enumerate(runs, start=1)
    ]


def differences_table(views: Sequence[ComparisonView]) -> Table:
    """Make the table of all candidates: the baseline's score, each candidate's difference."""
    columns = dict.fromkeys(row.task for view in views for row in view.columns)
    names = [*columns, *dict.fromkeys(row.task for view in views for row in view.averages)]
    by_name = [{row.task: row for row in view.rows} for view in views]
    baselines = {name: _baseline(by_name, name) for name in names}
    is_one = all(row.baseline_text == baselines[row.task] for view in views for row in view.rows)
    caption = (
        "Baseline in percent; candidates as difference in points with "
        f"{views[0].level_text} interval. ▲ better, ▼ worse, ● cannot tell, ○ not tested."
    )
    if not is_one:
        # Questions that a candidate did not answer, and columns it lacks, are left out for it.
        caption += " From: the baseline's score on the questions and columns of this candidate."
    return Table(
        caption=caption,
        header=("Column", views[0].baseline, *(view.candidate for view in views)),
        rows=[
            [name, baselines[name], *(_cell(one.get(name), baselines[name]) for one in by_name)]
            for name in names
        ],
        numeric=frozenset(range(1, len(views) + 2)),
        footer=max(len(view.averages) for view in views),
    )


def _one_caption(views: Sequence[ComparisonView]) -> list[Block]:
    """Say what the numbers are, where that is the same for all candidates."""
    captions = {rows.caption(view, is_narrow=True) for view in views if view.protocols}
    return [Paragraph(text, "note") for text in captions] if len(captions) == 1 else []


def _one(view: ComparisonView, comparison: Mapping[str, Any]) -> Section:
    """Show one candidate as a comparison of two is shown, without its flipped questions."""
    scores, *_ = comparison_sections(comparison, start=f"Scores with {view.candidate}")
    spread = seeds_section(view)
    blocks: list[Block] = [*scores.blocks, *(spread.blocks if spread else [])]
    return Section(view.candidate, blocks)


def _differences_figure(views: Sequence[ComparisonView]) -> list[Block]:
    from kuea_mllm.reporting.drawing import figure_svg
    from kuea_mllm.reporting.score_figures import (
        Differences,
        candidate_differences,
        split_columns,
    )

    names = list(dict.fromkeys(row.task for view in views for row in view.rows if row.has_interval))
    if not names:
        return []
    candidates = []
    for view in views:
        by_name = {row.task: row for row in view.rows}
        values = [_points(by_name[name]) if name in by_name else None for name in names]
        candidates.append(Differences(view.candidate, values))
    ends = [end for one in candidates for value in one.values if value for end in value[1:]]
    slices = split_columns(len(names), len(candidates))
    caption = (
        f"Candidate minus baseline with {views[0].level_text} intervals. An interval that crosses "
        "the zero line leaves the direction open."
    )
    return [
        Figure(
            figure_svg(
                candidate_differences(
                    names[part],
                    [Differences(one.name, one.values[part]) for one in candidates],
                    span=(min(ends), max(ends)),
                ),
                f"candidate-differences-{number}",
            ),
            alt=f"Differences of the candidates to the baseline, as in the table above: "
            f"{', '.join(names[part])}.",
            caption=" ".join([caption, *part_text(number, slices, names)]),
        )
        for number, part in enumerate(slices)
    ]


def _points(row: ColumnView) -> tuple[float, float, float] | None:
    if row.difference is None or row.low is None or row.high is None:
        return None
    return (100 * row.difference, 100 * row.low, 100 * row.high)


def _cell(row: ColumnView | None, baseline: str) -> str | Cell:
    if row is None:
        return DASH
    text, tone = VERDICT_LOOKS[row.verdict_text]
    start = "" if row.baseline_text == baseline else f", from {row.baseline_text}"
    return Cell(f"{text[0]} {row.difference_text}{start}", tone)


def _baseline(by_name: Sequence[Mapping[str, ColumnView]], name: str) -> str:
    return next(one[name].baseline_text for one in by_name if name in one)
