"""Task files that we write for lmms-eval: the YAML of one task and the rows beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VERSION = 1.0


@dataclass(frozen=True)
class WrittenTask:
    """One task that was written for the time of a run.

    Attributes:
        name: Name in lmms-eval and in the results.
        dataset: Data set.
        path: Its YAML file.
        content: Hash of what it asks; a resumed evaluation knows it by that.
    """

    name: str
    dataset: str
    path: Path
    content: str


class Function(str):
    """A dotted name that the task file writes as `!function name`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    Function, lambda dumper, name: dumper.represent_scalar("!function", str(name))
)


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a task file."""
    text = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows_of(file: Path) -> dict[str, Any]:
    """Return the keys of a task file that read its documents from JSON lines beside it."""
    return {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": file.name},
            # Beside the task, so that a run leaves no copy in the user's cache.
            "cache_dir": str(file.parent / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
    }


def metadata(
    suite: str | None,
    protocol: str,
    column: str,
    *,
    statistic: str,
    judged: bool = False,
    part: str | None = None,
    version: Any = VERSION,
) -> dict[str, Any]:
    """Return what a task tells about itself; lmms-eval keeps it untouched.

    Args:
        suite: Suite that the column belongs to.
        protocol: What is asked and how it is scored; columns of two protocols are never compared.
        column: How the column is called in tables.
        statistic: How documents become the column's score (see `evaluation.statistics`).
        judged: Whether a language model grades the answers.
        part: Columns that are averaged by themselves too, such as those of 4 shots.
        version: Of the task.
    """
    return {
        "version": version,
        "kuea": {
            "suite": suite,
            "protocol": protocol,
            "column": column,
            "statistic": statistic,
            "judged": judged,
            **({} if part is None else {"part": part}),
        },
    }


def hash_files(*paths: Path, also: object = None) -> str:
    """Hash the content of files and a plain JSON value (SHA-256, hex)."""
    digest = hashlib.sha256(json.dumps(also, sort_keys=True).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
