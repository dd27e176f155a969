"""The encoder tables of the mini world, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MARKS = {"better": " ▲", "worse": " ▼"}


def probe_study_markdown(record: Mapping[str, Any]) -> str:
    """Return scores, and differences to the original tower with intervals of two kinds.

    Args:
        record: Content of `probe_table.json`.
    """
    worlds = len(record["seeds"])
    original = record["scores"]["original"]
    differences = record["differences"]
    spread = "one world" if worlds == 1 else f"mean of {worlds} worlds"
    parts = [
        f"Scores in percent, {spread}, {_questions(differences)}; differences in "
        "points. ▲ better, ▼ worse by the paired test over pictures (Holm over the columns of a "
        "tower), unmarked: cannot tell.",
        "Differences with 95 % intervals over pictures, the same ones drawn for all worlds.",
        _table(original, differences, _over_pictures),
    ]
    if worlds > 1:
        parts += [
            "The same with 95 % t intervals over worlds, and in how many of them the score rose.",
            _table(original, differences, lambda found: _over_worlds(found, worlds)),
        ]
    return "\n\n".join(parts) + "\n"


def _questions(differences: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [column for found in differences.values() for column in found["columns"].values()]
    numbers = sorted({int(column["n"]) for column in columns if column.get("n") is not None})
    if not numbers:
        return "numbers of questions not recorded"
    span = dict.fromkeys(f"{number:,}" for number in (numbers[0], numbers[-1]))
    return f"n = {' to '.join(span)} questions in each column and world"


def _table(
    original: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, Any]],
    cell: Callable[[Mapping[str, Any]], str],
) -> str:
    lines = [["column", "original", *(name.replace("_", " ") for name in differences)]]
    for name, score in original.items():
        cells = [found["columns"].get(name) for found in differences.values()]
        shown = ["" if one is None else cell(one) for one in cells]
        lines.append([_title(name, score), f"{score['mean']:.1f}", *shown])
    averages = dict.fromkeys(n for found in differences.values() for n in found["averages"])
    for name in averages:
        found = [content["averages"].get(name) for content in differences.values()]
        known = next(one for one in found if one is not None)
        shown = ["" if one is None else cell(one) for one in found]
        lines.append([f"**{name}**", f"{100 * known['baseline']:.1f}", *shown])
    head, *rows = lines
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([_line(head), rule, *map(_line, rows)])


def _title(name: str, score: Mapping[str, Any]) -> str:
    suite = str(score["suite"]).removeprefix("probe-")
    return name if name.startswith(suite) or name.endswith(suite) else f"{suite}: {name}"


def _over_pictures(found: Mapping[str, Any]) -> str:
    text = f"{100 * found['difference']:+.1f}"
    if found["low"] is not None:
        text += f" [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return text + _MARKS.get(str(found["verdict"]), "")


def _over_worlds(found: Mapping[str, Any], worlds: int) -> str:
    seeds = found.get("seeds")
    if not seeds:
        return f"{100 * found['difference']:+.1f}"
    changes: Sequence[float] = seeds["differences"]
    mean = sum(changes) / len(changes)
    interval = f"[{100 * seeds['low']:+.1f}, {100 * seeds['high']:+.1f}]"
    return f"{100 * mean:+.1f} {interval} ({sum(c > 1e-9 for c in changes)}/{worlds})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
