"""Pick example questions from two results directories."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.io import read_json
from kuea_mllm.reporting.blocks import Example

_IMAGE_LIMIT_BYTES = 1_000_000


def pick_examples(
    baseline: Path,
    candidate: Path,
    tasks: Sequence[str] | None = None,
    *,
    per_kind: int = 4,
) -> list[Example]:
    """Pick questions that were won, lost and left unchanged, the same number of each at most.

    The choice depends on the questions' names alone, so it cannot favour a model, and it is the
    same on every run. Questions with a stored picture go first; within that, wins and losses are
    spread over the tasks. Questions that a model failed to answer are not among them.

    Args:
        baseline: Results directory of the baseline.
        candidate: Results directory of the candidate.
        tasks: Columns to draw from; all of the baseline's if None. Columns without a score per
            question, or where a lower score is better, give no examples.
        per_kind: Largest number of wins, of losses, and of unchanged questions.

    Raises:
        EvaluationError: If a sample file is not readable.
    """
    groups: dict[str, list[tuple[tuple[bool, int, str], Example]]] = {
        "won": [],
        "lost": [],
        "same": [],
    }
    columns = _columns(baseline)
    for task in columns if tasks is None else tasks:
        if not columns.get(task, {}).get("higher_is_better", True):
            continue
        ranks = {"won": 0, "lost": 0, "same": 0}
        for key, example in sorted(_pairs(baseline, candidate, task), key=lambda pair: pair[0]):
            kind = _kind(example)
            groups[kind].append(((key[0], ranks[kind], key[1]), example))
            ranks[kind] += 1
    picked: list[Example] = []
    for group in groups.values():
        group.sort(key=lambda pair: pair[0])
        picked.extend(example for _, example in group[:per_kind])
    return [_with_image(example, baseline) for example in picked]


def show_examples(results: Path, task: str, *, number: int = 8) -> list[Example]:
    """Pick questions of one results directory by a fixed rule, for a gallery of one model.

    Raises:
        EvaluationError: If the sample file is not readable.
    """
    rows = _read_rows(results, task)
    chosen = sorted(rows.values(), key=lambda row: _sort_key(results, task, row))[:number]
    return [_with_image(_example(task, row, None), results) for row in chosen]


def _columns(results: Path) -> dict[str, dict[str, Any]]:
    columns: dict[str, dict[str, Any]] = read_json(Path(results) / "summary.json")["columns"]
    return columns


def _pairs(baseline: Path, candidate: Path, task: str) -> list[tuple[tuple[bool, str], Example]]:
    before, after = _read_rows(baseline, task), _read_rows(candidate, task)
    pairs = []
    for doc_id, row in before.items():
        other = after.get(doc_id)
        if other is not None and row["score"] is not None and other["score"] is not None:
            pairs.append((_sort_key(baseline, task, row), _example(task, row, other)))
    return pairs


def _read_rows(results: Path, task: str) -> dict[str, dict[str, Any]]:
    column = _columns(results).get(task, {})
    path = Path(results) / column.get("samples", f"samples/{task}.jsonl")
    if not path.exists() and "samples" not in column:
        return {}
    scale = float(column.get("scale") or 1)
    try:
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        return {str(row["doc_id"]): {**row, "score": _score(row, scale)} for row in rows}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"sample file {path} is not readable: {error}.", "Run the evaluation again."
        ) from error


def _sort_key(results: Path, task: str, row: dict[str, Any]) -> tuple[bool, str]:
    doc_id = str(row["doc_id"])
    digest = hashlib.sha256(f"{task}/{doc_id}".encode()).hexdigest()
    return (not _image_path(results, task, doc_id).exists(), digest)


def _example(task: str, row: dict[str, Any], other: dict[str, Any] | None) -> Example:
    return Example(
        task=task,
        doc_id=str(row["doc_id"]),
        question=str(row.get("question", "")),
        expected=str(row.get("target", "")),
        baseline_answer=_answer(row),
        candidate_answer=None if other is None else _answer(other),
        baseline_score=row["score"],
        candidate_score=None if other is None else other["score"],
    )


def _answer(row: dict[str, Any]) -> str | None:
    return None if row.get("failed") else str(row.get("answer", ""))


def _score(row: dict[str, Any], scale: float) -> float | None:
    score = row.get("score")
    return None if row.get("failed") or score is None else float(score) / scale


def _kind(example: Example) -> str:
    before, after = example.baseline_score or 0.0, example.candidate_score or 0.0
    return "won" if after > before else "lost" if after < before else "same"


def _image_path(results: Path, task: str, doc_id: str) -> Path:
    return Path(results) / "thumbnails" / task / f"{doc_id}.png"


def _with_image(example: Example, results: Path) -> Example:
    path = _image_path(results, example.task, example.doc_id)
    if not path.is_file() or path.stat().st_size > _IMAGE_LIMIT_BYTES:
        return example
    image = path.read_bytes()
    if not image.startswith(b"\x89PNG\r\n\x1a\n"):
        return example
    return dataclasses.replace(example, image=image)
