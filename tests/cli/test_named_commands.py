"""Commands that messages and documents name do exist."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

import kuea_mllm
from kuea_mllm.cli.main import app

ROOT = Path(kuea_mllm.__file__).parents[1]
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
# In backticks, or at the end of a sentence that gives one: not "kuea-mllm wrote this".
NAMED = re.compile(r"`kuea-mllm ([a-z][a-z-]*)")
PLACES = [
    *sorted((ROOT / "kuea_mllm").rglob("*.py")),
    *sorted((ROOT / "adapters").rglob("*.py")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
]


def test_every_command_that_is_named_exists() -> None:
    named = {
        (path.relative_to(ROOT).as_posix(), command)
        for path in PLACES
        for command in NAMED.findall(path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert {each for each in named if each[1] not in COMMANDS} == set()


def test_a_wrong_name_would_be_found() -> None:
    assert NAMED.findall("weights are damaged: `kuea-mllm inspect TOWER`.") == ["inspect"]
    assert "inspect" not in COMMANDS
