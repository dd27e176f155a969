"""The results directory: what `eval` writes and `compare` and the reports read.

results/
    summary.json              one entry per task under `columns`
    samples/<task>.jsonl      one row per document, sorted by document id
    thumbnails/<task>/*.png   the first images of each task
    lmms/                     lmms-eval's own result and sample files
    lmms_eval.log             lmms-eval's own log
    run.yaml                  the resolved recipe, where one was used
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kuea_mllm.errors import EvaluationError
from kuea_mllm.io import read_json

KIND = "results"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SampleRow:
    """One document of one task and what became of it.

    Attributes:
        doc_id: Position of the document in its split.
        cluster: Group of documents that depend on each other, usually the image.
        question: The prompt.
        target: The right answer.
        answer: What the model said, or `FAILED_ANSWER`.
        score: Score on the scale of the column; None where the task has no score per document.
        failed: Whether there is no answer or no judgement of it.
        error: What failed.
    """

    doc_id: int
    cluster: str
    question: str
    target: str
    answer: str
    score: float | None
    failed: bool
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Write the row as it stands in the samples file."""
        row = {key: value for key, value in vars(self).items() if key != "error"}
        return row if self.error is None else {**row, "error": self.error}


@dataclass(frozen=True)
class Results:
    """A results directory that was found complete.

    Attributes:
        path: The directory.
        summary: Content of `summary.json`.
    """

    path: Path
    summary: Mapping[str, Any]

    @property
    def columns(self) -> Mapping[str, Mapping[str, Any]]:
        """Entries of `summary.json` by task."""
        return cast(Mapping[str, Mapping[str, Any]], self.summary["columns"])

    def rows(self, task: str) -> list[SampleRow]:
        """Read the rows of one task.

        Raises:
            EvaluationError: If the file is missing, damaged or has another number of rows than
                the summary says.
        """
        column = self.columns[task]
        path = self.path / str(column["samples"])
        rows = _read_rows(path)
        if len(rows) != column["n"]:
            raise EvaluationError(
                f"file {path} holds {len(rows)} samples, the summary says {column['n']}.",
                "The directory was changed after the run: evaluate again.",
            )
        return rows


def load_results(path: Path) -> Results:
    """Open a results directory.

    Raises:
        EvaluationError: If it is not one, or was written by another version.
    """
    path = Path(path)
    if not path.is_dir():
        raise EvaluationError(
            f"results directory {path} does not exist.", "Give the --out of `kuea-mllm eval`."
        )
    if not (path / "summary.json").is_file():
        raise EvaluationError(
            f"directory {path} holds no results: summary.json is missing.",
            "Give the --out of `kuea-mllm eval`.",
        )
    summary = read_json(path / "summary.json")
    if not isinstance(summary, dict) or summary.get("kind") != KIND:
        raise EvaluationError(
            f"file {path / 'summary.json'} is not a summary of results (kind: results).",
            "Give the --out of `kuea-mllm eval`.",
        )
    if summary.get("schema_version") != SCHEMA_VERSION:
        raise EvaluationError(
            f"file {path / 'summary.json'} has schema version {summary.get('schema_version')}, "
            f"this version of kuea-mllm reads {SCHEMA_VERSION}.",
            "Evaluate again, or use the version that wrote it.",
        )
    return Results(path, summary)


def write_rows(path: Path, rows: Sequence[SampleRow]) -> None:
    """Write the rows of one task as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            # ASCII only: answers may hold line separators and lone surrogates, which break readers.
            file.write(json.dumps(row.to_json(), allow_nan=False) + "\n")


def finite(value: object) -> float | None:
    """Return a number as a float; None for anything else, NaN and infinities included."""
    if isinstance(value, str) or value is None:
        return None
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def file_name(task: str) -> str:
    """Turn a task name into the name of its files."""
    return task.replace("/", "_")


def _read_rows(path: Path) -> list[SampleRow]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                rows.append(_parse_row(path, number, line))
    except FileNotFoundError as error:
        raise EvaluationError(
            f"file {path} is missing.", "The directory is not complete: evaluate again."
        ) from error
    return rows


def _parse_row(path: Path, number: int, line: str) -> SampleRow:
    try:
        return SampleRow(**json.loads(line))
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"file {path}, line {number} is not a sample row: {error}.",
            "The directory was changed after the run: evaluate again.",
        ) from error
