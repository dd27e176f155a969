"""Columns of probes as a results directory: what `compare` and the reports read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.columns import fingerprint_rows
from kuea_mllm.evaluation.results import SampleRow, write_rows
from kuea_mllm.evaluation.statistics import (
    Outcomes,
    measure_value,
    require_statistic,
    standard_error,
)
from kuea_mllm.evaluation.thumbnails import thumbnail_writer
from kuea_mllm.probing.column import ProbeColumn, ProbeRow
from kuea_mllm.workflows.probe_suites import Job, JobColumns, slug

SUITE_PREFIX = "probe-"
THUMBNAILS = 200
"""Pictures of a data set that are kept for reports, spread evenly over it."""

_PROTOCOLS = {"patch": "patch-seg", "mmvp-vlm": "mmvp-vlm"}
# Scores of classes are shown for few classes: a table of ImageNet's thousand helps no one.
_MOST_PARTS = 20
_TOLERANCE = 1e-6
_EVERY_QUESTION = 2**62


@dataclass(frozen=True)
class ResultColumn:
    """One entry of a summary, and its rows."""

    entry: dict[str, Any]
    rows: list[SampleRow]


def result_columns(job: Job, found: JobColumns) -> list[ResultColumn]:
    """Turn the columns of a job into those of a results directory.

    Raises:
        EvaluationError: If the score of a column does not follow from its rows.
    """
    return [_result_column(job, column, found) for column in found.columns]


def write_columns(
    folder: Path, columns: Sequence[ResultColumn], found: JobColumns, *, thumbnails: int
) -> dict[str, dict[str, Any]]:
    """Write rows and pictures of a job's columns.

    Args:
        folder: Results directory, or a part of one.
        columns: What `result_columns` made.
        found: What it was made of.
        thumbnails: How many pictures are kept.

    Returns:
        Entries of the summary by task.
    """
    for column in columns:
        write_rows(folder / str(column.entry["samples"]), column.rows)
    _write_pictures(folder / "thumbnails", columns, found, thumbnails)
    return {str(column.entry["task"]): column.entry for column in columns}


def _result_column(job: Job, column: ProbeColumn, found: JobColumns) -> ResultColumn:
    task = f"probe_{column.suite}_{slug(column.name)}".replace("-", "_")
    require_statistic(column.statistic, task)
    rows = [_sample_row(row, found.root) for row in column.rows]
    if not rows:
        raise EvaluationError(f"column {column.name} has no rows.")
    outcomes = Outcomes.of_rows(column.statistic, rows)
    measure = outcomes.measure(column.statistic)
    score = measure_value(measure, outcomes.cluster_count)
    if abs(100 * score - column.score) > _TOLERANCE:
        raise EvaluationError(
            f"column {column.name}: its score is {column.score}, its rows give {100 * score}."
        )
    parts = outcomes.breakdown(column.statistic) if column.statistic != "macro_recall" else {}
    dataset: Mapping[str, Any] = column.details.get("dataset") or {}
    entry: dict[str, Any] = {
        "task": task,
        "column": column.name,
        "suite": f"{SUITE_PREFIX}{column.suite}",
        "protocol": _protocol(job, column),
        "statistic": column.statistic,
        "judged": False,
        "part": _average_of(job),
        "version": _version(job, column),
        "metric": column.metric,
        "filter": "none",
        "split": dataset.get("split") or job.data.split,
        "score": score,
        "scale": 1,
        "stderr": standard_error(measure) or None,
        "higher_is_better": True,
        "n": len(rows),
        **_sizes(job, found),
        "failed": 0,
        "clusters": outcomes.cluster_count,
        "paired": True,
        "reason": None,
        "missing": None,
        "breakdown": parts if len(parts) <= _MOST_PARTS else {},
        "samples": f"samples/{task}.jsonl",
        "dataset_fingerprint": _fingerprint(rows, column.details),
        "pictures": _pictures(column.details),
        "expected": [
            expected.model_dump(mode="json")
            for expected in job.data.expected
            if expected.column == column.name
        ],
        "details": column.details,
    }
    return ResultColumn(entry, rows)


def _sizes(job: Job, found: JobColumns) -> dict[str, Any]:
    """Say how large the published data set is, and the one that lies here."""
    *training, scored = found.sizes or (None,)
    return {
        "dataset": job.data.name,
        "documents": job.data.documents,
        "documents_found": scored,
        "train_documents": job.data.train_documents if training else None,
        "train_documents_found": training[0] if training else None,
    }


def _sample_row(row: ProbeRow, root: str) -> SampleRow:
    score = row.score
    extra: dict[str, Any] = {}
    if row.counts is not None:
        extra["counts"] = row.counts
        if score is None:
            # So that a report can say of a picture whether it is seen better or worse.
            score = float(np.mean([hits / count for hits, count in row.counts.values()]))
    return SampleRow(
        doc_id=row.doc_id,
        cluster=_relative(row.cluster, root),
        question=row.question,
        target=_relative(row.target, root),
        answer=_relative(row.answer, root),
        score=score,
        failed=False,
        group=row.group,
        image=_picture_file(row.image),
        **extra,
    )


def _picture_file(name: str | None) -> str | None:
    """Return the whole path of a picture, for reports that are made in another folder.

    Members of archives are no files; of those, a picture is only there if one was kept.
    """
    if name is None or not Path(name).is_file():
        return None
    return str(Path(name).absolute())


def _relative(name: str, root: str) -> str:
    """Leave out the folder of the data set, which differs between machines."""
    return name.removeprefix(f"{root.rstrip('/')}/")


def _protocol(job: Job, column: ProbeColumn) -> str:
    return "released" if job.faults else _PROTOCOLS.get(column.suite, "clip-benchmark")


def _average_of(job: Job) -> str | None:
    """Return the average of the recipe that covers a data set."""
    return next((name for name, d in job.recipe.averages.items() if job.data.name in d), None)


def _version(job: Job, column: ProbeColumn) -> str:
    """Hash what a score depends on besides pictures, labels and models."""
    recipe = job.recipe
    is_trained = recipe.linear is not None or recipe.patch is not None
    content = {
        "schema": 1,
        "templates": column.details.get("templates"),
        "linear": None if recipe.linear is None else recipe.linear.model_dump(mode="json"),
        "patch": None if recipe.patch is None else recipe.patch.model_dump(mode="json"),
        "seed": recipe.seed if is_trained else None,
        "faults": sorted(job.faults),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _fingerprint(rows: Sequence[SampleRow], details: Mapping[str, Any]) -> str:
    """Hash what was asked, and the data sets that it is from."""
    sets = [(details.get(key) or {}).get("fingerprint") for key in ("dataset", "train")]
    content = json.dumps([fingerprint_rows(rows), sets])
    return hashlib.sha256(content.encode()).hexdigest()


def _pictures(details: Mapping[str, Any]) -> str | None:
    """Return what the scored pictures are recognised by, whatever is asked about them."""
    features, dataset = (details.get(key) or {} for key in ("features", "dataset"))
    found = features.get("images") or dataset.get("fingerprint")
    return None if found is None else str(found)


def _write_pictures(
    folder: Path, columns: Iterable[ResultColumn], found: JobColumns, count: int
) -> None:
    """Keep small copies of some pictures, and say which question of each column has which."""
    total = len(found.images)
    if not count or not total:
        return
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
    names = {found.images.name(index): index for index in chosen}
    # Question by picture: the first of those that a picture has in a column.
    asked: dict[int, dict[str, int]] = {index: {} for index in chosen}
    for column, source in zip(columns, found.columns, strict=True):
        for row in source.rows:
            index = names.get(row.image or "")
            if index is not None:
                asked[index].setdefault(str(column.entry["task"]), row.doc_id)
    keep = thumbnail_writer(folder, _EVERY_QUESTION)
    for index, tasks in asked.items():
        if tasks:
            image = found.images.read(index)
            for task, doc_id in tasks.items():
                keep(task, doc_id, [image])
