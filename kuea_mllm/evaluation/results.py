"""The results directory: what `eval` writes and `compare` and the reports read.

results/
    summary.json              one entry per task under `columns`
    samples/<task>.jsonl      one row per document, sorted by document id
    thumbnails/               small pictures of the first questions, see `thumbnails`
    lmms/                     lmms-eval's own result and sample files
    lmms_eval.log             lmms-eval's own log
    run.yaml                  the resolved recipe, where one was used
    judge/<task>.jsonl        raw verdicts, where answers were graded
    report.html               all of it to look at
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from kuea_mllm.errors import EvaluationError
from kuea_mllm.io import read_json

KIND = "results"
SCHEMA_VERSION = 2
"""2: what a score is made of stands in the rows; columns state protocol and statistic."""

Box = tuple[float, float, float, float]

_OPTIONAL = frozenset(
    ("error", "group", "reference", "label", "answer_box", "target_box", "image", "counts")
)


@dataclass(frozen=True)
class SampleRow:
    """One document of one task and what became of it.

    Attributes:
        doc_id: Position of the document in its split.
        cluster: Group of documents that depend on each other, usually the image.
        question: The prompt.
        target: The right answer.
        answer: What the model said, or `FAILED_ANSWER`.
        score: Score on the scale of the column (ratios and areas: see `statistics`); None where
            the task has no score per document.
        failed: Whether there is no answer or no judgement of it.
        error: What failed.
        group: Part of the data set that is scored by itself, such as a subset of POPE.
        reference: What the score is divided by, the judge's score of the reference answer.
        label: Class of the document, 0 or 1, where the score is a probability.
        answer_box: Box of the answer, in fractions of the image: left, top, right, bottom.
        target_box: Box that was asked for, likewise.
        image: File of the image.
        counts: Of a macro recall: class -> [how often it was found, how often it was there].
    """

    doc_id: int
    cluster: str
    question: str
    target: str
    answer: str
    score: float | None
    failed: bool
    error: str | None = None
    group: str | None = None
    reference: float | None = None
    label: int | None = None
    answer_box: Box | None = None
    target_box: Box | None = None
    image: str | None = None
    counts: dict[str, list[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Write the row as it stands in the samples file; what it does not have is left out."""
        return {
            key: value
            for key, value in vars(self).items()
            if value is not None or key not in _OPTIONAL
        }


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
            EvaluationError: If the file is missing, damaged, has another number of rows than
                the summary says, or a document twice.
        """
        column = self.columns[task]
        path = self.path / str(column["samples"])
        rows = _read_rows(path)
        if len(rows) != column["n"]:
            raise EvaluationError(
                f"file {path} holds {len(rows)} samples, the summary says {column['n']}.",
                "The directory was changed after the run: evaluate again.",
            )
        (doc_id, times), *_ = Counter(row.doc_id for row in rows).most_common(1) or [(0, 1)]
        if times > 1:
            raise EvaluationError(
                f"file {path} holds document {doc_id} {times} times.",
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
            f"It holds two: give {path / 'baseline'} or {path / 'candidate'}."
            if (path / "candidate" / "summary.json").is_file()
            else "Give the --out of `kuea-mllm eval`.",
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
    _require_columns(path / "summary.json", summary.get("columns"))
    return Results(path, summary)


def write_rows(path: Path, rows: Sequence[SampleRow]) -> None:
    """Write the rows of one task as JSON lines; a file that exists is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                # ASCII only: answers may hold line separators and lone surrogates, which break
                # readers.
                file.write(json.dumps(row.to_json(), allow_nan=False) + "\n")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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


def _require_columns(path: Path, columns: object) -> None:
    """Refuse a summary whose columns lie elsewhere: results may come from somebody else."""
    if not isinstance(columns, dict) or not all(isinstance(one, dict) for one in columns.values()):
        raise EvaluationError(
            f"file {path} has no columns.", "The directory is not complete: evaluate again."
        )
    for task, entry in columns.items():
        samples = PurePosixPath(str(entry.get("samples")))
        if len(samples.parts) != 2 or samples.parts[0] != "samples" or samples.name == "..":
            raise EvaluationError(
                f"file {path}: the samples of column {task} are {str(samples)!r}, which is no "
                "file in the folder samples/ beside it.",
                "The directory was changed after the run: evaluate again.",
            )


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
        content = json.loads(line)
        for key in ("answer_box", "target_box"):
            if content.get(key) is not None:
                content[key] = tuple(content[key])
        for key in ("score", "reference"):
            if content.get(key) is not None and finite(content[key]) is None:
                raise ValueError(f"{key} is {content[key]!r}")
        return SampleRow(**content)
    except (AttributeError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"file {path}, line {number} is not a sample row: {error}.",
            "The directory was changed after the run: evaluate again.",
        ) from error
