"""From lmms-eval's result of one task to our column and sample rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kuea_mllm.errors import EnvironmentFailure
from kuea_mllm.evaluation.loading import document_count, main_metric
from kuea_mllm.evaluation.results import SampleRow, file_name, finite
from kuea_mllm.evaluation.scores import extract_scores, find_clusters, is_missing_judgement
from kuea_mllm.evaluation.session import FAILED_ANSWER, Failure
from kuea_mllm.evaluation.stats import cluster_standard_error


@dataclass(frozen=True)
class Column:
    """One task's entry in the summary, and its rows."""

    entry: dict[str, Any]
    rows: list[SampleRow]


def build_column(
    name: str,
    task: Any,
    *,
    results: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    failures: Sequence[Failure],
    limit: int | None,
) -> Column:
    """Read one task out of lmms-eval's results.

    Args:
        name: The task.
        task: lmms-eval's task object.
        results: lmms-eval's result dictionary.
        samples: lmms-eval's rows of this task, before its tracker rewrites them.
        failures: Questions of any task that got no answer.
        limit: Documents per task that were asked for.

    Raises:
        EnvironmentFailure: If lmms-eval scored another number of documents than the task has.
    """
    metric = str(main_metric(task))
    filter_name = str(task._filters[0].name)
    samples = _first_filter(samples, len(task._filters))
    _require_all(name, [int(sample["doc_id"]) for sample in samples], document_count(task, limit))
    samples = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    score = finite(results["results"][name].get(f"{metric},{filter_name}"))
    items = [sample.get(metric) for sample in samples]
    scores = extract_scores(
        items,
        score,
        score_key=task.get_config("score_key") or "score",
        aggregate=task.aggregation().get(metric),
    )
    rows = _build_rows(
        name,
        samples=samples,
        items=items,
        scores=scores.values,
        failures=failures,
        task=task,
    )
    paired = [row.score for row in rows if row.score is not None]
    clusters = [row.cluster for row in rows]
    stderr = cluster_standard_error(paired, clusters) if scores.is_paired else None
    if stderr is None:
        stderr = finite(results["results"][name].get(f"{metric}_stderr,{filter_name}"))
    # An error of zero comes from answers that are all right or all wrong; it is no certainty.
    stderr = stderr or None
    entry = {
        "task": name,
        "version": _version(task),
        "metric": metric,
        "filter": filter_name,
        "score": score,
        "scale": scores.scale,
        "stderr": stderr,
        "higher_is_better": bool(task.higher_is_better().get(metric, True)),
        "n": len(rows),
        "failed": sum(row.failed for row in rows),
        "clusters": len(set(clusters)),
        "paired": scores.is_paired,
        "reason": scores.reason,
        "samples": f"samples/{file_name(name)}.jsonl",
        "dataset_fingerprint": fingerprint_rows(rows),
    }
    return Column(entry, rows)


def fingerprint_rows(rows: Sequence[SampleRow]) -> str:
    """Hash what was asked: document ids, questions and right answers (SHA-256, hex)."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.doc_id, row.question, row.target]).encode())
    return digest.hexdigest()


def _first_filter(
    samples: Sequence[Mapping[str, Any]], filters: int
) -> Sequence[Mapping[str, Any]]:
    # With several filters lmms-eval lists all documents once per filter, without saying which.
    return samples[: len(samples) // filters] if filters > 1 else samples


def _require_all(name: str, doc_ids: Sequence[int], expected: int) -> None:
    if len(doc_ids) != expected or len(set(doc_ids)) != expected:
        raise EnvironmentFailure(
            f"task {name}: lmms-eval scored {len(set(doc_ids))} documents instead of {expected}.",
            "The task or the plugin loses documents; see the log with --debug.",
        )


def _build_rows(
    name: str,
    *,
    samples: Sequence[Mapping[str, Any]],
    items: Sequence[Any],
    scores: Sequence[float | None],
    failures: Sequence[Failure],
    task: Any,
) -> list[SampleRow]:
    errors = {failure.doc_id: failure.error for failure in failures if failure.task == name}
    doc_ids = [int(sample["doc_id"]) for sample in samples]
    clusters = find_clusters(
        [sample["doc"] for sample in samples], items, doc_ids, task.get_config("cluster_key")
    )
    rows = []
    for sample, item, score, doc_id, cluster in zip(
        samples, items, scores, doc_ids, clusters, strict=True
    ):
        answer = _first_text(sample["resps"])
        error = errors.get(doc_id)
        if error is None and is_missing_judgement(item):
            error = "the judge gave no score"
        rows.append(
            SampleRow(
                doc_id=doc_id,
                cluster=cluster,
                question=str(sample["arguments"][0]),
                target=_text(sample["target"]),
                answer=answer,
                score=score,
                failed=error is not None or answer == FAILED_ANSWER,
                error=error,
            )
        )
    return rows


def _first_text(responses: Any) -> str:
    while isinstance(responses, list | tuple):
        if not responses:
            return ""
        responses = responses[0]
    return str(responses)


def _text(value: Any) -> str:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _version(task: Any) -> str | int | float | None:
    version = task.VERSION
    # "Yaml" is the class default: the file states no version.
    if version is None or version == "Yaml":
        return None
    return version if isinstance(version, str | int | float) else str(version)
