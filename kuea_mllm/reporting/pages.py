"""Put reports together from blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kuea_mllm.reporting import rows
from kuea_mllm.reporting.blocks import (
    Block,
    Bullets,
    Cell,
    Details,
    Example,
    Figure,
    FlipColumn,
    Flips,
    Gallery,
    KeyValues,
    Paragraph,
    Report,
    Section,
    Table,
    Tiles,
    Tone,
)
from kuea_mllm.reporting.paper import OwnScores, paper_section
from kuea_mllm.reporting.provenance import models_blocks
from kuea_mllm.reporting.run_sections import (
    asked_section,
    groups_section,
    score_figure_blocks,
    seeds_section,
    view_series,
)
from kuea_mllm.reporting.sentences import average_sentence, headline, power_remark
from kuea_mllm.reporting.text import count, p_value, percent
from kuea_mllm.reporting.view import (
    MISSING,
    NOT_TESTED,
    ColumnView,
    ComparisonView,
    parse_comparison,
)

VERDICT_LOOKS: dict[str, tuple[str, Tone]] = {
    "better": ("▲ better", "better"),
    "worse": ("▼ worse", "worse"),
    "cannot tell": ("● cannot tell", "unclear"),
    NOT_TESTED: ("○ not tested", "unclear"),
    MISSING: ("○ missing", "unclear"),
}


def comparison_report(
    *,
    comparison: Mapping[str, Any],
    baselines: Sequence[Mapping[str, Any]],
    candidates: Sequence[Mapping[str, Any]],
    flips: Sequence[FlipColumn] = (),
    extra_sections: Sequence[Section] = (),
    provenance: Sequence[tuple[str, str]] = (),
) -> Report:
    """Build the report of a comparison.

    Args:
        comparison: The comparison's JSON form.
        baselines: `summary.json` of the baseline, one for each seed.
        candidates: `summary.json` of the candidate, in the same order.
        flips: Questions whose score moved, see `examples.pick_flips`.
        extra_sections: Sections between the comparison and the settings, such as kernel figures.
        provenance: Pairs of name and value: commands, versions, fingerprints.

    Raises:
        EvaluationError: If the comparison is not complete.
    """
    view = parse_comparison(comparison)
    pair = [(view.baseline, baselines[0]), (view.candidate, candidates[0])]
    finding, *more_found = comparison_summary(view)
    scores, *more = comparison_sections(comparison)
    figures = Section("Both models in one picture", score_figure_blocks(*view_series([view])))
    found = [
        replace(scores, blocks=[*scores.blocks], sections=[figures] if figures.blocks else []),
        *more,
        paper_section([OwnScores(view.baseline, baselines), OwnScores(view.candidate, candidates)]),
        seeds_section(view),
        groups_section([(view.baseline, baselines), (view.candidate, candidates)]),
        _flips_section(flips, view, len(baselines)),
        *extra_sections,
        asked_section(pair),
        Section("The two models", models_blocks(_all_runs(view, baselines, candidates))),
        _provenance(provenance) if provenance else None,
    ]
    return Report(
        title="Paired comparison",
        subtitle=f"Baseline: {view.baseline}. Candidate: {view.candidate}.",
        summary=[finding, verdict_tiles(view), *more_found],
        sections=[section for section in found if section is not None],
    )


def quickstart_report(
    *,
    title: str,
    subtitle: str = "",
    summary: Sequence[Block] = (),
    sections: Sequence[Section],
    provenance: Sequence[tuple[str, str]] = (),
) -> Report:
    """Build a report from sections, with where it came from at its end."""
    last = [_provenance(provenance)] if provenance else []
    return Report(title, subtitle, summary, [*sections, *last])


def comparison_summary(view: ComparisonView) -> list[Block]:
    """Say what a comparison found: the finding first, then what it leaves open."""
    blocks: list[Block] = [Paragraph(headline(view), "lead")]
    for text in (average_sentence(view), power_remark(view)):
        if text:
            blocks.append(Paragraph(text))
    return blocks


def comparison_sections(
    comparison: Mapping[str, Any], *, examples: Sequence[Example] = (), start: str = "Scores"
) -> list[Section]:
    """Build the sections of a comparison: scores, and example questions if there are any.

    Args:
        comparison: The comparison's JSON form.
        examples: Questions to show, see `examples.pick_examples`.
        start: How the caption of the table begins.
    """
    # Imported here because matplotlib takes a second, which a report without figures need not pay.
    from kuea_mllm.reporting.figures import figure_svg, paired_differences

    view = parse_comparison(comparison)
    blocks: list[Block] = [comparison_table(view, start), *_table_notes(view)]
    if any(column.has_interval for column in view.columns):
        blocks.append(
            Figure(
                figure_svg(paired_differences(comparison), "paired-differences"),
                alt=_describe_differences(view),
                caption=f"Candidate minus baseline with {view.level_text} intervals. "
                "An interval that crosses the zero line leaves the direction open.",
            )
        )
    if view.remarks:
        blocks.append(Paragraph("What to keep in mind:", "note"))
        blocks.append(Bullets(view.remarks))
    sections = [Section("Scores", blocks)]
    if examples:
        sections.append(example_section(examples, view.baseline, view.candidate))
    return sections


def comparison_table(view: ComparisonView, start: str = "Scores") -> Table:
    """Build the table of a comparison; what was found comes first, for narrow screens.

    Args:
        view: The comparison.
        start: How the caption begins; differs between the tables of one page.
    """
    return Table(
        caption=f"{start} in percent, differences in percentage points.",
        header=(
            "Column",
            "Verdict",
            f"Difference [{view.level_text} interval]",
            "Baseline",
            "Candidate",
            "p (Holm)",
            "Won / lost",
            "Questions",
            "Metric",
        ),
        rows=[_table_row(column) for column in view.rows],
        numeric=frozenset(range(2, 8)),
        footer=len(view.averages),
    )


def example_section(
    examples: Sequence[Example], baseline: str, candidate: str, heading: str = "Example questions"
) -> Section:
    """Show questions, those won and those lost with equal room."""
    groups: dict[str, list[Example]] = {
        "The candidate scores higher": [],
        "The baseline scores higher": [],
        "Same score": [],
        "Not scored": [],
    }
    higher, lower, same, unscored = groups.values()
    for example in examples:
        before, after = example.baseline_score, example.candidate_score
        if before is None or after is None:
            unscored.append(example)
        else:
            (higher if after > before else lower if after < before else same).append(example)
    return Section(
        heading,
        [
            Paragraph(
                "Picked by a fixed rule, not by hand: up to the same number from each group. "
                "How often each group occurs is in the table above, not here.",
                "note",
            )
        ],
        [
            Section(name, [Gallery(items, baseline, candidate)])
            for name, items in groups.items()
            if items
        ],
    )


def verdict_tiles(view: ComparisonView) -> Tiles:
    """Return the comparison in large numbers: the average, and how many columns moved."""
    items: list[tuple[str, str, Tone]] = []
    if view.average is not None:
        text, tone = VERDICT_LOOKS[view.average.verdict]
        items.append((view.average.difference_text, f"points on average: {text}", tone))
    for verdict, (text, tone) in VERDICT_LOOKS.items():
        number = sum(column.verdict_text == verdict for column in view.columns)
        if number:
            items.append((str(number), text, tone))
    return Tiles(items)


def _flips_section(flips: Sequence[FlipColumn], view: ComparisonView, seeds: int) -> Section | None:
    if not flips:
        return None
    text = (
        "Questions whose score moved, by column. Which ones are shown follows from a hash of their "
        "names, not from what the models said: those with a picture first, each picture once "
        "before any twice, as many gained as lost."
    )
    if seeds > 1:
        text += f" Answers are those of the first of {seeds} seeds."
    return Section(
        "Flipped questions",
        [Paragraph(text, "note"), Flips(flips, view.baseline, view.candidate)],
    )


def _all_runs(
    view: ComparisonView,
    baselines: Sequence[Mapping[str, Any]],
    candidates: Sequence[Mapping[str, Any]],
) -> list[tuple[str, Mapping[str, Any]]]:
    sides = ((view.baseline, baselines), (view.candidate, candidates))
    return [
        (name if len(runs) == 1 else f"{name}, run {number}", run)
        for name, runs in sides
        for number, run in enumerate(runs, start=1)
    ]


def _table_row(column: ColumnView) -> list[str | Cell]:
    flips = "" if column.n is None or column.reason else f"{column.improved} / {column.worsened}"
    return [
        column.task,
        Cell(*VERDICT_LOOKS[column.verdict_text]),
        column.difference_text,
        column.baseline_text,
        column.candidate_text,
        p_value(column.p_holm),
        flips or ("" if column.n is None else "n/a"),
        "" if column.n is None else count(column.n),
        column.metric if column.higher_is_better else f"{column.metric} (lower is better)",
    ]


def _describe_differences(view: ComparisonView) -> str:
    rows = [f"{c.task} {c.difference_text}, {c.verdict}" for c in view.rows if c.has_interval]
    return f"Difference in points with {view.level_text} interval: {'; '.join(rows)}."


def _table_notes(view: ComparisonView) -> list[Block]:
    text = (
        "Both models answered the same questions. A verdict other than “cannot tell” needs an "
        f"adjusted p-value below {view.alpha:g}; the adjustment (Holm) allows for the number of "
        "columns, the intervals do not."
    )
    blocks: list[Block] = [Paragraph(rows.caption(view), "note")] if view.protocols else []
    blocks.append(Paragraph(text, "note"))
    clusters = [
        f"{c.task}: {count(c.n)} questions about {count(c.clusters)} pictures or groups"
        for c in view.columns
        if c.clusters is not None and c.clusters != c.n
    ]
    details = [
        f"{c.task}: differences of {percent(c.detectable)} points or more would be seen with "
        "80 % power"
        for c in view.columns
        if c.detectable is not None
    ]
    if found := [*clusters, *details, *view.notes]:
        blocks.append(Details("Sample sizes and power", [Bullets(found)]))
    return blocks


def _provenance(pairs: Sequence[tuple[str, str]]) -> Section:
    return Section("Where this comes from", [KeyValues(pairs)])
