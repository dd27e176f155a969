"""From lmms-eval's result of one task to our column and sample rows.

A task of ours says in `metadata.kuea` of its YAML what it is: suite, protocol, display name of the
column, statistic, and whether a judge scores its answers. Other tasks are lmms-eval's own protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER, Failure
from kuea_mllm.evaluation.lmms.loading import document_count, main_metric
from kuea_mllm.evaluation.results import Box, SampleRow, file_name, finite
from kuea_mllm.evaluation.scores import (
    SampleScores,
    extract_scores,
    find_clusters,
    is_missing_judgement,
    lost_groups,
)
from kuea_mllm.evaluation.statistics import (
    ALL_RIGHT_IN_CLUSTER,
    MEAN,
    Outcomes,
    measure_value,
    require_statistic,
    standard_error,
)
from kuea_mllm.evaluation.targets import right_answers

PROTOCOL = "lmms-eval"
NO_JUDGE = "no judge was given (--judge-url, --judge-model)"

# Metrics of stock tasks that are no mean over documents: how they come out of them instead.
_STATISTICS = {"mmvp_pair_accuracy": ALL_RIGHT_IN_CLUSTER}


@dataclass(frozen=True)
class ColumnKind:
    """What the YAML of a task says about its column.

    Attributes:
        column: Name that tables show.
        suite: Suite the task was written for.
        protocol: How it is asked and scored; scores of two protocols are never compared.
        statistic: How the score comes out of the documents.
        judged: Whether a judge scores the answers.
        part: Columns that are averaged by themselves too, such as those of 4 shots.
    """

    column: str
    suite: str | None = None
    protocol: str = PROTOCOL
    statistic: str = MEAN
    judged: bool = False
    part: str | None = None


def column_kind(name: str, task: Any) -> ColumnKind:
    """Read `metadata.kuea` of a task.

    Raises:
        EvaluationError: If it has unknown keys or names no known statistic.
    """
    content = (task.get_config("metadata") or {}).get("kuea")
    if content is None:
        return ColumnKind(name, statistic=_STATISTICS.get(str(main_metric(task)), MEAN))
    try:
        kind = ColumnKind(**{"column": name, **content})
    except TypeError as error:
        known = ", ".join(vars(ColumnKind(name)))
        raise EvaluationError(
            f"task {name}: metadata.kuea cannot be read: {error}.", f"Its keys: {known}."
        ) from error
    require_statistic(kind.statistic, name)
    return kind


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
    items = [sample.get(metric) for sample in samples]
    kind = column_kind(name, task)
    clusters = find_clusters(
        [sample["doc"] for sample in samples],
        items,
        [int(sample["doc_id"]) for sample in samples],
        task.get_config("cluster_key"),
    )
    missing = NO_JUDGE if kind.judged else _missing_judgements(items)
    score = None if missing else finite(results["results"][name].get(f"{metric},{filter_name}"))
    if missing:
        scores = SampleScores([None] * len(items), 100, missing)
    else:
        scores = extract_scores(
            items,
            score,
            score_key=task.get_config("score_key") or "score",
            aggregate=task.aggregation().get(metric),
            statistic=kind.statistic,
            clusters=clusters,
        )
    rows = _build_rows(
        name,
        samples=samples,
        items=items,
        scores=scores.values,
        clusters=clusters,
        failures=failures,
    )
    entry = {
        "task": name,
        **vars(kind),
        "version": _version(task),
        "metric": metric,
        "filter": filter_name,
        "split": _split(task),
        "score": score,
        "scale": scores.scale,
        "stderr": None,
        "higher_is_better": bool(task.higher_is_better().get(metric, True)),
        "n": len(rows),
        "failed": sum(row.failed for row in rows),
        "clusters": len(set(clusters)),
        "paired": scores.is_paired,
        "reason": scores.reason,
        "missing": missing,
        "breakdown": {},
        "samples": f"samples/{file_name(name)}.jsonl",
        # Of lmms-eval's own targets: tasks may write into the documents while they score.
        "dataset_fingerprint": fingerprint_rows(rows),
    }
    rows = _show_right_answers(rows, samples, task.get_config("doc_to_target"))
    if scores.is_paired:
        # lmms-eval's own number stands, which tasks round.
        entry = {**score_column(Column(entry, rows)).entry, "score": score}
    if entry["stderr"] is None and not missing:
        # lmms-eval's, which knows no clusters. An error of zero comes from answers that are all
        # right or all wrong; it is no certainty.
        error = finite(results["results"][name].get(f"{metric}_stderr,{filter_name}"))
        entry["stderr"] = error or None
    return Column(entry, rows)


def score_column(column: Column) -> Column:
    """Compute what follows from the rows of a column: score, standard error, breakdown.

    Used again where a judge has given rows their scores. Rows without a score are left out; where
    no row has one, or none of a group that the score is a mean over, the column is missing.
    """
    entry = column.entry
    statistic, scale = str(entry["statistic"]), float(entry["scale"])
    used = [row for row in column.rows if row.score is not None]
    lost = lost_groups(statistic, column.rows, used)
    if not used or lost:
        missing = entry["missing"] or "no document has a score"
        if used:
            missing = f"no document of {', '.join(lost)} has a score"
        empty: dict[str, Any] = {"score": None, "stderr": None, "breakdown": {}, "paired": False}
        return replace(column, entry={**entry, **empty, "missing": missing, "reason": missing})
    outcomes = Outcomes.of_rows(statistic, used)
    measure = outcomes.measure(statistic, scale)
    found = {
        "score": measure_value(measure, outcomes.cluster_count),
        "stderr": standard_error(measure) or None,
        "breakdown": outcomes.breakdown(statistic, scale),
        "paired": True,
        "reason": None,
        "missing": None,
        "failed": sum(row.failed for row in column.rows),
    }
    return replace(column, entry={**entry, **found})


def fingerprint_rows(rows: Sequence[SampleRow]) -> str:
    """Hash what was asked: document ids, questions, right answers, groups (SHA-256, hex)."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.doc_id, row.question, row.target, row.group, row.label]
        digest.update(json.dumps(content).encode())
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
    clusters: Sequence[str],
    failures: Sequence[Failure],
) -> list[SampleRow]:
    errors = {failure.doc_id: failure.error for failure in failures if failure.task == name}
    rows = []
    for sample, item, score, cluster in zip(samples, items, scores, clusters, strict=True):
        doc_id = int(sample["doc_id"])
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
                **_details(item),
            )
        )
    return rows


def _show_right_answers(
    rows: Sequence[SampleRow], samples: Sequence[Mapping[str, Any]], rule: object
) -> list[SampleRow]:
    shown = []
    for row, sample in zip(rows, samples, strict=True):
        answers = right_answers(sample["doc"], sample["target"], rule)
        shown.append(row if answers is None else replace(row, target=answers))
    return shown


def _missing_judgements(items: Sequence[Any]) -> str | None:
    # lmms-eval would score the column 100.
    count = sum(is_missing_judgement(item) for item in items)
    return f"the judge gave no score for {count} of {len(items)} documents" if count else None


def _details(item: Any) -> dict[str, Any]:
    """Take what a task of ours says about a document beside its score."""
    if not isinstance(item, Mapping):
        return {}
    group, label, image = item.get("group"), item.get("label"), item.get("image")
    return {
        "group": None if group is None else str(group),
        "reference": finite(item.get("reference")),
        "label": label if isinstance(label, int) and label in (0, 1) else None,
        "answer_box": _box(item.get("answer_box")),
        "target_box": _box(item.get("target_box")),
        "image": image if isinstance(image, str) else None,
    }


def _box(value: Any) -> Box | None:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    left, top, right, bottom = (finite(side) for side in value)
    if left is None or top is None or right is None or bottom is None:
        return None
    return left, top, right, bottom


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


def _split(task: Any) -> str | None:
    for key in ("test_split", "validation_split"):
        if task.get_config(key):
            return str(task.get_config(key))
    return None


def _version(task: Any) -> str | int | float | None:
    version = task.VERSION
    # "Yaml" is the class default: the file states no version.
    if version is None or version == "Yaml":
        return None
    return version if isinstance(version, str | int | float) else str(version)
