"""Pick questions from results directories, by a rule that cannot favour a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kuea_mllm.errors import EvaluationError
from kuea_mllm.io import read_json
from kuea_mllm.reporting.blocks import Box, Example, FlipColumn, FlipGroup
from kuea_mllm.reporting.pictures import PictureShelf
from kuea_mllm.reporting.view import parse_comparison

SHOWN_PER_DIRECTION = 8
LISTED_PER_DIRECTION = 100

Row: TypeAlias = dict[str, Any]
State: TypeAlias = Literal["right", "wrong", "scored", "failed"]


def pick_examples(
    baseline: Path,
    candidate: Path,
    tasks: Sequence[str] | None = None,
    *,
    per_kind: int = 4,
) -> list[Example]:
    """Pick questions that were won, lost and left unchanged, the same number of each at most.

    The choice depends on the questions' names alone, so it cannot favour a model, and it is the
    same on every run. Questions with a picture go first, each picture once; within that, wins and
    losses are spread over the tasks. Questions that a model failed to answer are not among them.

    Args:
        baseline: Results directory of the baseline.
        candidate: Results directory of the candidate.
        tasks: Columns to draw from; all of the baseline's if None. Columns without a score per
            question, or where a lower score is better, give no examples.
        per_kind: Largest number of wins, of losses, and of unchanged questions.

    Raises:
        EvaluationError: If a sample file is not readable.
    """
    shelf = PictureShelf([baseline, candidate])
    columns = _columns(baseline)
    groups: dict[str, list[tuple[tuple[bool, int], str, Row, Row]]] = {}
    for kind in ("won", "lost", "same"):
        groups[kind] = []
    for task in columns if tasks is None else tasks:
        if not columns.get(task, {}).get("higher_is_better", True):
            continue
        pairs = _pairs(baseline, candidate, task)
        for kind, group in groups.items():
            rows = {key: pair for key, pair in pairs.items() if _kind(*pair) == kind}
            order = _in_order(task, [pair[0] for pair in rows.values()], shelf)
            for rank, row in enumerate(order):
                before, after = rows[str(row["doc_id"])]
                group.append(((not shelf.has(task, row), rank), task, before, after))
    picked = []
    for group in groups.values():
        group.sort(key=lambda entry: entry[0])
        picked += [
            _example(task, before, after, shelf) for _, task, before, after in group[:per_kind]
        ]
    return picked


def pick_flips(
    comparison: Mapping[str, Any],
    baseline: Path,
    candidate: Path,
    *,
    shown: int = SHOWN_PER_DIRECTION,
    listed: int = LISTED_PER_DIRECTION,
) -> list[FlipColumn]:
    """Pick questions that were gained and lost in each column, by the rule of `pick_examples`.

    Args:
        comparison: The comparison's JSON form, which says which questions moved.
        baseline: Results directory of the baseline.
        candidate: Results directory of the candidate.
        shown: Most cards per column and direction.
        listed: Most further lines per column and direction.

    Raises:
        EvaluationError: If a sample file is not readable.
    """
    shelf = PictureShelf([baseline, candidate])
    view = parse_comparison(comparison)
    names = {"baseline": view.baseline, "candidate": view.candidate}
    found = []
    for (task, column), shown_column in zip(
        comparison["columns"].items(), view.columns, strict=True
    ):
        moved = {
            direction: [str(number) for number in (column.get(key) or {}).get("doc_ids", ())]
            for direction, key in (("gained", "improved"), ("lost", "worsened"))
        }
        wanted = {doc_id for doc_ids in moved.values() for doc_id in doc_ids}
        if not wanted:
            continue
        pairs = _pairs(baseline, candidate, task, wanted)
        groups = {}
        for direction, doc_ids in moved.items():
            rows = [pairs[doc_id][0] for doc_id in doc_ids if doc_id in pairs]
            order = [pairs[str(row["doc_id"])] for row in _in_order(task, rows, shelf)]
            # With several seeds a question may have moved in another run than the one shown.
            order.sort(key=lambda pair: _kind(*pair) == "same")
            cards = [_example(task, *pair, shelf, names) for pair in order[:shown]]
            lines = [_example(task, *pair) for pair in order[shown : shown + listed]]
            groups[direction] = FlipGroup(
                total=len(doc_ids),
                shown=[dataclasses.replace(card, task=shown_column.task) for card in cards],
                listed=lines,
            )
        file = f"samples/{task.replace('/', '_')}.jsonl"
        found.append(FlipColumn(shown_column.task, groups["gained"], groups["lost"], file))
    return found


def show_examples(
    results: Path,
    task: str,
    *,
    number: int = 8,
    kind: State | None = None,
) -> list[Example]:
    """Pick questions of one results directory by a fixed rule, for a gallery of one model.

    Args:
        results: The directory.
        task: The column.
        number: Most questions.
        kind: Only those with a full score, with less, with a score that says nothing about right
            or wrong, or without an answer.

    Raises:
        EvaluationError: If the sample file is not readable.
    """
    shelf = PictureShelf([results])
    rows = [row for row in _read_rows(results, task).values() if kind in (None, _state(row))]
    name = str(_columns(results).get(task, {}).get("column") or task)
    picked = [_example(task, row, None, shelf) for row in _in_order(task, rows, shelf)[:number]]
    return [dataclasses.replace(example, task=name) for example in picked]


def _in_order(task: str, rows: Sequence[Row], shelf: PictureShelf) -> list[Row]:
    """Sort rows: those with a picture first, each picture once before any twice, then by hash."""
    by_hash = sorted(rows, key=lambda row: _digest(task, row))
    seen: dict[str, int] = {}
    keyed = []
    for place, row in enumerate(by_hash):
        cluster = str(row.get("cluster", row["doc_id"]))
        seen[cluster] = seen.get(cluster, 0) + 1
        keyed.append(((not shelf.has(task, row), seen[cluster], place), row))
    return [row for _, row in sorted(keyed, key=lambda pair: pair[0])]


def _digest(task: str, row: Row) -> str:
    return hashlib.sha256(f"{task}/{row['doc_id']}".encode()).hexdigest()


def _columns(results: Path) -> dict[str, dict[str, Any]]:
    columns: dict[str, dict[str, Any]] = read_json(Path(results) / "summary.json")["columns"]
    return columns


def _pairs(
    baseline: Path, candidate: Path, task: str, wanted: Collection[str] | None = None
) -> dict[str, tuple[Row, Row]]:
    """Return the rows of both by document, of those that both have scored."""
    before = _read_rows(baseline, task, wanted)
    after = _read_rows(candidate, task, wanted)
    return {
        doc_id: (row, after[doc_id])
        for doc_id, row in before.items()
        if doc_id in after and row["score"] is not None and after[doc_id]["score"] is not None
    }


def _read_rows(results: Path, task: str, wanted: Collection[str] | None = None) -> dict[str, Row]:
    column = _columns(results).get(task, {})
    note = _NOTES.get(str(column.get("statistic"))) or _NOTES.get(str(column.get("metric")))
    path = Path(results) / column.get("samples", f"samples/{task}.jsonl")
    if not path.exists() and "samples" not in column:
        return {}
    scale = float(column.get("scale") or 1)
    found = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.strip():
                    continue
                row = json.loads(line)
                doc_id = str(row["doc_id"])
                # One row at a time: a test set of 200,000 questions need not be in memory.
                if wanted is None or doc_id in wanted:
                    score = _score(row, 1.0 if note else scale)
                    text = note(row) if note and score is not None else ""
                    found[doc_id] = {**row, "score": score, "note": text}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"sample file {path} is not readable: {error}.", "Run the evaluation again."
        ) from error
    return found


def _example(
    task: str,
    row: Row,
    other: Row | None,
    shelf: PictureShelf | None = None,
    names: Mapping[str, str] | None = None,
) -> Example:
    image, missing = (None, "") if shelf is None else shelf.load(task, row)
    return Example(
        task=task,
        doc_id=str(row["doc_id"]),
        question=str(row.get("question", "")),
        expected=str(row.get("target", "")),
        baseline_answer=_answer(row),
        candidate_answer=None if other is None else _answer(other),
        baseline_score=row["score"],
        candidate_score=None if other is None else other["score"],
        baseline_note=row["note"],
        candidate_note="" if other is None else other["note"],
        image=image,
        no_image=missing,
        boxes=_boxes(row, other, names or {}),
        group=str(row.get("group") or ""),
    )


def _boxes(row: Row, other: Row | None, names: Mapping[str, str]) -> list[Box]:
    candidates: list[tuple[str, Literal["expected", "baseline", "candidate"], object]] = [
        ("expected", "expected", row.get("target_box")),
        (names.get("baseline", "answer"), "baseline", row.get("answer_box")),
        (names.get("candidate", "candidate"), "candidate", (other or {}).get("answer_box")),
    ]
    return [
        Box(label, role, corners)
        for label, role, value in candidates
        if (corners := _corners(value)) is not None
    ]


def _corners(value: object) -> tuple[float, float, float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in value):
        return None
    left, top, right, bottom = (min(max(float(number), 0.0), 1.0) for number in value)
    return (left, top, right, bottom)


def _answer(row: Row) -> str | None:
    return None if row.get("failed") else str(row.get("answer", ""))


def _score(row: Row, scale: float) -> float | None:
    score = row.get("score")
    return None if row.get("failed") or score is None else float(score) / scale


def _kind(before: Row, after: Row) -> str:
    gain = after["score"] - before["score"]
    return "won" if gain > 0 else "lost" if gain < 0 else "same"


def _state(row: Row) -> State:
    if row["score"] is None:
        return "failed"
    if row["note"]:
        return "scored"
    return "right" if row["score"] >= 1 else "wrong"


def _judged(row: Row) -> str:
    return f"{row['score']:g} of 10, reference {row.get('reference') or 0:g}"


# Scores that are no share of what is right: what to say instead, by statistic or metric.
_NOTES: dict[str, Callable[[Row], str]] = {
    "ratio_of_sums": _judged,
    "mean_of_group_ratios": _judged,
    "roc_auc": lambda row: f"P(yes) {row['score']:.2f}",
    "cider": lambda row: f"CIDEr {row['score']:.0f}",
}
