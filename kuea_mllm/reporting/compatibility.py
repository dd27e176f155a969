"""A compatibility report or a verification on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kuea_mllm.reporting.text import one_line

_STYLES = {"ok": "green", "warn": "bold yellow", "refuse": "bold red"}
_VERDICTS = {
    "ok": "The tower fits",
    "warn": "The tower fits, but read the warnings",
    "refuse": "A swap would be refused",
}


def compatibility_table(report: Mapping[str, Any]) -> Table:
    """Make the table of a report: a row per check, remedies of warnings and refusals below theirs.

    Args:
        report: As `swap` keeps it in `kuea.json` under "compatibility".
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for name in ("check", "base", "tower"):
        table.add_column(name, overflow="fold", ratio=1 if name != "check" else None)
    table.add_column("verdict", no_wrap=True)
    for check in report["checks"]:
        verdict = str(check["verdict"])
        shown = "forced" if check.get("forced") else verdict
        cells = [Text(one_line(check[key])) for key in ("name", "base", "tower")]
        table.add_row(*cells, Text(shown, style=_STYLES[verdict]))
    return table


def print_compatibility(title: str, report: Mapping[str, Any]) -> None:
    """Print the table of a report, what its warnings and refusals mean, and the verdict."""
    console = Console()
    console.print(Text(one_line(title), style="bold"))
    console.print(compatibility_table(report))
    for (verdict, remedy), names in _remedies(report).items():
        line = Text.assemble((f"{verdict}: ", _STYLES[verdict]), one_line(", ".join(names)), ": ")
        console.print(line + Text(one_line(remedy)))
    verdict = str(report["verdict"])
    console.print(Text(f"{_VERDICTS[verdict]} ({count_checks(report)}).", style=_STYLES[verdict]))


def count_checks(report: Mapping[str, Any]) -> str:
    """Say how many checks a report holds, and how many of them were not simply passed."""
    verdicts = [str(check["verdict"]) for check in report["checks"]]
    refused, warned = verdicts.count("refuse"), verdicts.count("warn")
    parts = [f"{len(verdicts)} checks", *([f"{refused} refused"] if refused else [])]
    return ", ".join([*parts, "1 warning" if warned == 1 else f"{warned} warnings"])


def _remedies(report: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Return the checks by what is to be done: ten differences often have one cause."""
    found: dict[tuple[str, str], list[str]] = {}
    for check in report["checks"]:
        verdict = str(check["verdict"])
        if verdict != "ok" and check.get("remedy"):
            found.setdefault((verdict, str(check["remedy"])), []).append(str(check["name"]))
    return found
