"""Put reports together from blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kuea_mllm.reporting.blocks import (
    Block,
    Bullets,
    Cell,
    Details,
    Example,
    Figure,
    Gallery,
    KeyValues,
    Paragraph,
    Report,
    Section,
    Table,
    Tone,
)
from kuea_mllm.reporting.sentences import average_sentence, headline, power_remark
from kuea_mllm.reporting.text import clean, count, p_value, percent, value_text
from kuea_mllm.reporting.view import NOT_TESTED, ColumnView, ComparisonView, parse_comparison

_VERDICTS: dict[str, tuple[str, Tone]] = {
    "better": ("▲ better", "better"),
    "worse": ("▼ worse", "worse"),
    "cannot tell": ("● cannot tell", "unclear"),
    NOT_TESTED: ("○ not tested", "unclear"),
}


def comparison_report(
    *,
    comparison: Mapping[str, Any],
    baseline_summary: Mapping[str, Any],
    candidate_summary: Mapping[str, Any],
    examples: Sequence[Example] = (),
    extra_sections: Sequence[Section] = (),
    provenance: Sequence[tuple[str, str]] = (),
) -> Report:
    """Build the report of a comparison.

    Args:
        comparison: The comparison's JSON form.
        baseline_summary: `summary.json` of the baseline.
        candidate_summary: `summary.json` of the candidate.
        examples: Questions to show, see `examples.pick_examples`.
        extra_sections: Sections between the comparison and the settings, such as kernel figures.
        provenance: Pairs of name and value: commands, versions, fingerprints.

    Raises:
        EvaluationError: If the comparison is not complete.
    """
    view = parse_comparison(comparison)
    sections = comparison_sections(comparison, examples=examples)
    sections.extend(extra_sections)
    sections.append(
        Section(
            "The two models",
            sections=[
                Section(view.baseline, [KeyValues(describe_results(baseline_summary))]),
                Section(view.candidate, [KeyValues(describe_results(candidate_summary))]),
            ],
        )
    )
    if provenance:
        sections.append(_provenance(provenance))
    return Report(
        title="Paired comparison",
        subtitle=f"Baseline: {view.baseline}. Candidate: {view.candidate}.",
        summary=comparison_summary(view),
        sections=sections,
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
    comparison: Mapping[str, Any], *, examples: Sequence[Example] = ()
) -> list[Section]:
    """Build the sections of a comparison: scores, and example questions if there are any."""
    # Imported here because matplotlib takes a second, which a report without figures need not pay.
    from kuea_mllm.reporting.figures import figure_svg, paired_differences

    view = parse_comparison(comparison)
    blocks: list[Block] = [comparison_table(view), *_table_notes(view)]
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


def comparison_table(view: ComparisonView) -> Table:
    """Build the table of a comparison; what was found comes first, for narrow screens."""
    return Table(
        caption="Scores in percent, differences in percentage points.",
        header=(
            "Task",
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
        footer=1 if view.average else 0,
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


def describe_results(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what is known about a results directory: model, tower, settings, versions."""
    pairs = [
        *_prefixed("", summary.get("model")),
        *_prefixed("", summary.get("settings")),
        *[(f"version of {name}", value) for name, value in _prefixed("", summary.get("versions"))],
    ]
    for key in ("created", "command", "seconds"):
        if summary.get(key) is not None:
            pairs.append((key, value_text(summary[key])))
    return pairs


def _prefixed(prefix: str, values: object) -> list[tuple[str, str]]:
    if not isinstance(values, Mapping):
        return []
    pairs = []
    for key, value in values.items():
        name = f"{prefix}{clean(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            pairs.extend(_prefixed(f"{name}: ", value))
        elif value is not None:
            pairs.append((name, value_text(value)))
    return pairs


def _table_row(column: ColumnView) -> list[str | Cell]:
    flips = "" if column.n is None or column.reason else f"{column.improved} / {column.worsened}"
    return [
        column.task,
        Cell(*_VERDICTS[column.verdict]),
        column.difference_text,
        column.baseline_text,
        column.candidate_text,
        p_value(column.p_holm),
        flips or "n/a",
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
        "columns, the intervals do not. The p-value of the average is not adjusted. Won and lost "
        "count the questions whose score rose or fell."
    )
    blocks: list[Block] = [Paragraph(text, "note")]
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
    notes = [f"{c.task}: {c.note}" for c in view.rows if c.note]
    if clusters or details or notes:
        blocks.append(Details("Sample sizes and power", [Bullets([*clusters, *details, *notes])]))
    return blocks


def _provenance(pairs: Sequence[tuple[str, str]]) -> Section:
    return Section("Where this comes from", [KeyValues(pairs)])
