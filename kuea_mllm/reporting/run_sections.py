"""Sections about what was asked and how it was scored, for reports of one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kuea_mllm.reporting import rows
from kuea_mllm.reporting.blocks import (
    Block,
    Cell,
    Details,
    Figure,
    Paragraph,
    Section,
    Table,
)
from kuea_mllm.reporting.text import count, one_line, plain, plural, points
from kuea_mllm.reporting.view import ColumnView, ComparisonView

if TYPE_CHECKING:
    from kuea_mllm.reporting.score_figures import Series

Summary = Mapping[str, Any]
DASH = "–"  # noqa: RUF001 - a dash, meant as one
_OPEN_PARTS = 40

_STATISTICS = {
    "mean": "mean over questions",
    "mean_of_groups": "mean of the parts' means",
    "all_right_in_cluster": "pairs with both answers right",
    "ratio_of_sums": "judge's points, share of the reference's",
    "mean_of_group_ratios": "judge's points, share of the reference's, mean of the parts",
    "roc_auc": "area under the ROC curve",
    "macro_recall": "mean over classes of the share found",
}


def column_name(entry: Mapping[str, Any]) -> str:
    """Return how a column is called in tables."""
    return one_line(entry.get("column") or entry["task"])


def percent_of(entry: Mapping[str, Any]) -> float | None:
    """Return a column's score in percent of its highest score; a total as it is."""
    score = entry.get("score")
    if score is None:
        return None
    return float(score) * (100 / float(entry.get("scale") or 1) if is_share(entry) else 1.0)


def is_share(entry: Mapping[str, Any]) -> bool:
    """Tell whether a column's score is a share of a maximum, or a total."""
    # As in `view`: what a suite reports is a share, also where it may exceed its reference.
    highest = float(entry.get("scale") or 1) * 1.0001
    return abs(entry.get("score") or 0.0) <= highest or bool(entry.get("suite"))


def score_text(entry: Mapping[str, Any]) -> str:
    """Return a column's score in percent, or why there is none."""
    score = percent_of(entry)
    return "missing" if score is None else plain(score)


def asked_section(summaries: Sequence[tuple[str, Summary]]) -> Section:
    """Say what each column asked, by which rules, how much of it failed and what is missing.

    Args:
        summaries: Name and `summary.json` of the runs.
    """
    _, first = summaries[0]
    tasks = list(dict.fromkeys(task for _, summary in summaries for task in summary["columns"]))
    asked = [_asked_row(task, summaries) for task in tasks]
    header = [
        *("Column", "Protocol", "Questions", "Pictures or groups", "Not answered"),
        *("Score is the", "Task", "Missing because"),
    ]
    if not any(row[-1] for row in asked):
        header, asked = header[:-1], [row[:-1] for row in asked]
    table = Table(
        caption="Protocol and size of each column. Scores of two protocols are never compared.",
        header=header,
        rows=asked,
        numeric=frozenset(range(2, 5)),
    )
    return Section("What was asked", [*(Paragraph(t, "note") for t in _rules(first)), table])


def groups_section(sides: Sequence[tuple[str, Sequence[Summary]]]) -> Section | None:
    """Show the parts of columns that have parts, such as the subsets of POPE.

    Args:
        sides: Name and runs of each model; several runs of one model are averaged.

    Returns:
        None if no column has parts.
    """
    tasks = dict.fromkeys(task for _, runs in sides for run in runs for task in run["columns"])
    parts = [part for task in tasks if (part := _parts_of(task, sides))[1]]
    if not parts:
        return None
    header = ["Column and part", *(name for name, _ in sides)]
    if len(sides) == 2:
        header.append("Difference")

    def table(caption: str, found: Sequence[Sequence[str]]) -> Table:
        return Table(caption, header, found, numeric=frozenset(range(1, len(header))))

    blocks: list[Block] = [Paragraph("Parts are shown as they are: no interval, no test.", "note")]
    if sum(len(found) for _, found in parts) <= _OPEN_PARTS:
        together = [row for _, found in parts for row in found]
        blocks.insert(0, table("Scores of the parts of a column, in percent.", together))
        return Section("Parts of columns", blocks)
    # Classes of a data set are parts too: a thousand rows would bury what follows.
    folded = [
        Details(
            f"{name}: {plural(len(found), 'part')}",
            [table(f"Scores of the parts of {name}, in percent.", found)],
        )
        for name, found in parts
    ]
    return Section("Parts of columns", [*blocks, *folded])


def _parts_of(
    task: str, sides: Sequence[tuple[str, Sequence[Summary]]]
) -> tuple[str, list[list[str]]]:
    """Return the name of a column, and the rows of its parts."""
    entries = [[run["columns"].get(task) or {} for run in runs] for _, runs in sides]
    name = next(column_name(entry) for side in entries for entry in side if entry)
    found = []
    for group in dict.fromkeys(
        group for side in entries for entry in side for group in entry.get("breakdown") or {}
    ):
        scores = [_group_score(side, group) for side in entries]
        row = [f"{name}: {one_line(group)}", *map(plain_or_dash, scores)]
        if len(scores) == 2:
            before, after = scores
            gap = None if before is None or after is None else (after - before) / 100
            row.append(DASH if gap is None else points(gap))
        found.append(row)
    return name, found


def seeds_section(view: ComparisonView) -> Section | None:
    """Show the spread between seeds; None where there was one run of each model."""
    found = rows.seed_rows(view)
    if not found:
        return None
    table = Table(
        caption=f"Differences of single seeds of {view.candidate}, in percentage points.",
        header=[name.capitalize() for name in rows.SEED_HEADER],
        rows=found,
        numeric=frozenset({1, 3, 4, 5}),
    )
    note = (
        "The intervals in the table of scores say how much the choice of questions matters. These "
        "say how much another training would (Student's t over the seeds); with few seeds they "
        "are wide."
    )
    return Section("Spread between seeds", [table, Paragraph(note, "note")])


def view_series(
    views: Sequence[ComparisonView],
) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Return the columns and each model's scores in percent, for `score_figure_blocks`.

    Totals such as MME's, which are no share of anything, have no place on an axis in percent.
    """
    first = views[0]
    names = [column.task for column in first.columns]
    models = [(first.baseline, [_share(c, c.baseline) for c in first.columns])]
    for view in views:
        scores = {c.task: _share(c, c.candidate) for c in view.columns}
        models.append((view.candidate, [scores.get(name) for name in names]))
    return names, models


def score_figure_blocks(
    columns: Sequence[str], models: Sequence[tuple[str, Sequence[float | None]]]
) -> list[Block]:
    """Draw the scores of models as bars, and around a circle if there are enough columns.

    Args:
        columns: Their names.
        models: Name of each model and its scores in percent, None where there is none.
    """
    # Imported here because matplotlib takes a second, which a report without figures need not pay.
    from kuea_mllm.reporting.drawing import figure_svg
    from kuea_mllm.reporting.score_figures import (
        LEAST_SPOKES,
        MOST_SPOKES,
        Series,
        radar_columns,
        score_bars,
        score_radar,
        split_columns,
    )

    places = [
        place
        for place in range(len(columns))
        if any(values[place] is not None for _, values in models)
    ]
    if not places:
        return []
    names = [columns[place] for place in places]
    series = [Series(name, [values[place] for place in places]) for name, values in models]
    largest = max(score for one in series for score in one.values if score is not None)
    slices = split_columns(len(names), len(series))
    blocks: list[Block] = []
    for number, part in enumerate(slices):
        shown = [Series(one.name, one.values[part]) for one in series]
        bars = score_bars(names[part], shown, largest=largest)
        caption = ["Scores in percent.", *part_text(number, slices, names)]
        blocks.append(
            Figure(
                figure_svg(bars, f"score-bars-{number}"),
                alt=f"Bars of the scores. {_spoken(names[part], shown)}.",
                caption=" ".join([*caption, *_left_out(columns, names)]),
            )
        )
    around = radar_columns(names, series)
    if LEAST_SPOKES <= len(around) <= MOST_SPOKES:
        blocks.append(
            Figure(
                figure_svg(score_radar(names, series), "score-radar"),
                alt=f"Radar chart of the same scores in {plural(len(around), 'column')}.",
                caption="The same scores around a circle, 0 in the middle, 100 outside. A "
                "difference of a point cannot be seen here.",
            )
        )
    return blocks


def plain_or_dash(value: float | None) -> str:
    """Return a number with one decimal, a dash for none."""
    return DASH if value is None else plain(value)


def _share(column: ColumnView, score: float | None) -> float | None:
    return 100.0 * score if score is not None and column.is_share else None


def _spoken(columns: Sequence[str], series: Sequence[Series]) -> str:
    return "; ".join(
        f"{column}: " + ", ".join(f"{one.name} {plain_or_dash(one.values[i])}" for one in series)
        for i, column in enumerate(columns)
    )


def part_text(number: int, slices: Sequence[slice], columns: Sequence[str]) -> list[str]:
    """Say which columns one of several figures shows; nothing where there is only one."""
    if len(slices) == 1:
        return []
    part = columns[slices[number]]
    return [f"Figure {number + 1} of {len(slices)}: {part[0]} to {part[-1]}."]


def _left_out(columns: Sequence[str], drawn: Sequence[str]) -> list[str]:
    names = [name for name in columns if name not in drawn]
    return [f"Not drawn (missing, or a total): {', '.join(names)}."] if names else []


def _asked_row(task: str, summaries: Sequence[tuple[str, Summary]]) -> list[str | Cell]:
    entries = [summary["columns"].get(task) for _, summary in summaries]
    entry = next(found for found in entries if found)
    failed = [DASH if found is None else count(found.get("failed", 0)) for found in entries]
    missing = dict.fromkeys(
        text if len(entries) == 1 else f"{name}: {text}"
        for (name, _), found in zip(summaries, entries, strict=True)
        if (text := _why_missing(found))
    )
    reason = Cell("; ".join(missing), "warning") if missing else ""
    statistic = str(entry.get("statistic") or "mean")
    return [
        column_name(entry),
        one_line(entry.get("protocol") or "lmms-eval"),
        count(entry.get("n")),
        count(entry.get("clusters")),
        " / ".join(failed),
        _STATISTICS.get(statistic, statistic),
        one_line(task),
        reason,
    ]


def _why_missing(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "not part of this run"
    if entry.get("missing"):
        return one_line(entry["missing"])
    return "no score" if entry.get("score") is None else ""


def _rules(summary: Summary) -> list[str]:
    settings = summary.get("settings") or {}
    rules = [f"Suite: {one_line(settings['suite'])}."] if settings.get("suite") else []
    limit, seed = settings.get("limit"), settings.get("limit_seed")
    if limit is not None:
        which = "The first" if seed is None else "A random choice (seed " + str(seed) + ") of"
        which = "An evenly spread choice of" if settings.get("limit_spread") else which
        rules.append(f"{which} {limit} questions of each task: no benchmark score.")
    judge = settings.get("judge")
    if judge:
        rules.append(
            f"Judge: {one_line(judge.get('model'))} at {one_line(judge.get('url'))}. Its verdicts "
            "are in the results directory, folder judge."
        )
    elif any(entry.get("judged") for entry in summary["columns"].values()):
        rules.append("No judge was used: what needs one is missing, and not counted as zero.")
    return rules


def _group_score(entries: Sequence[Mapping[str, Any]], group: str) -> float | None:
    scores = [
        score
        for entry in entries
        if (score := percent_of({**entry, "score": (entry.get("breakdown") or {}).get(group)}))
        is not None
    ]
    return fmean(scores) if scores else None
