"""Comparing two results directories, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.average import AverageComparison, compare_average
from kuea_mllm.evaluation.pairing import ColumnComparison, compare_column
from kuea_mllm.evaluation.results import Results, load_results
from kuea_mllm.evaluation.stats import ALPHA, LEVEL, Verdict, decide, holm_adjust

KIND = "comparison"
SCHEMA_VERSION = 1

# What makes two columns different tests, and how it is called in the message.
_MUST_AGREE = (
    ("version", "task versions"),
    ("metric", "metrics"),
    ("filter", "answer filters"),
    ("higher_is_better", "directions of the metric"),
    ("n", "numbers of samples"),
    ("dataset_fingerprint", "sample sets (documents, questions or answers)"),
)


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same questions.

    Attributes:
        baseline: The first run.
        candidate: The second run; differences are candidate minus baseline.
        columns: Comparison per task.
        average: Comparison of the mean over all columns that can be averaged.
        only_in_baseline: Columns left out because the candidate lacks them.
        only_in_candidate: Columns left out because the baseline lacks them.
        warnings: What a reader should know about the pair.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
    """

    baseline: Results
    candidate: Results
    columns: Mapping[str, ColumnComparison]
    average: AverageComparison | None
    only_in_baseline: tuple[str, ...]
    only_in_candidate: tuple[str, ...]
    warnings: tuple[str, ...]
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Write the comparison as strict JSON values (no NaN)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "baseline": _describe(self.baseline),
            "candidate": _describe(self.candidate),
            "settings": {
                "resamples": self.resamples,
                "seed": self.seed,
                "level": LEVEL,
                "alpha": ALPHA,
                "limit": self.baseline.summary["settings"]["limit"],
            },
            "columns": {task: column.to_json() for task, column in self.columns.items()},
            "average": None if self.average is None else self.average.to_json(),
            "only_in": {
                "baseline": list(self.only_in_baseline),
                "candidate": list(self.only_in_candidate),
            },
            "warnings": list(self.warnings),
        }


def compare_results(
    baseline: Path,
    candidate: Path,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    common_only: bool = False,
) -> Comparison:
    """Compare two runs of `eval`.

    Args:
        baseline: Results directory of the first run.
        candidate: Results directory of the second run.
        resamples: Bootstrap resamples per column.
        seed: Seed of the bootstrap.
        common_only: Leave out columns that only one of the runs has, instead of refusing.

    Raises:
        EvaluationError: If a directory is not a complete run, or the runs did not answer the same
            questions under the same rules.
    """
    if resamples < 100:
        raise EvaluationError(
            f"{resamples} resamples are too few for a 95 % interval.", "Use 10,000."
        )
    first, second = load_results(baseline), load_results(candidate)
    _require_same_limit(first, second)
    tasks = _shared_tasks(first, second, common_only)
    for task in tasks:
        _require_same_test(task, first, second)
    # A stream of its own for each column, so that a column's numbers do not depend on the others.
    compared = [
        compare_column(
            task,
            first,
            second,
            resamples=resamples,
            seed=np.random.SeedSequence([seed, *_key(task)]),
        )
        for task in tasks
    ]
    columns = _with_verdicts(compared)
    return Comparison(
        baseline=first,
        candidate=second,
        columns={column.task: column for column in columns},
        average=compare_average(columns),
        only_in_baseline=tuple(task for task in first.columns if task not in second.columns),
        only_in_candidate=tuple(task for task in second.columns if task not in first.columns),
        warnings=tuple(_warnings(first, second, columns)),
        resamples=resamples,
        seed=seed,
    )


def _with_verdicts(columns: Sequence[ColumnComparison]) -> list[ColumnComparison]:
    adjusted = holm_adjust([column.p_value for column in columns])
    decided = []
    for column, p_holm in zip(columns, adjusted, strict=True):
        verdict: Verdict = decide(
            column.difference or 0.0,
            column.low,
            column.high,
            p_holm,
            higher_is_better=column.higher_is_better,
        )
        decided.append(column.with_verdict(p_holm, verdict))
    return decided


def _shared_tasks(first: Results, second: Results, common_only: bool) -> list[str]:
    shared = [task for task in first.columns if task in second.columns]
    lonely = {
        str(first.path): [task for task in first.columns if task not in shared],
        str(second.path): [task for task in second.columns if task not in shared],
    }
    if any(lonely.values()) and not common_only:
        texts = [f"{', '.join(tasks)} only in {path}" for path, tasks in lonely.items() if tasks]
        raise EvaluationError(
            f"the two runs have different columns: {'; '.join(texts)}.",
            "Evaluate the missing tasks too, or pass --common-only to leave them out.",
        )
    if not shared:
        raise EvaluationError(
            f"results {first.path} and {second.path} have no column in common.",
            "Evaluate both models on the same tasks.",
        )
    return shared


def _require_same_test(task: str, first: Results, second: Results) -> None:
    before, after = first.columns[task], second.columns[task]
    for key, name in _MUST_AGREE:
        if before[key] != after[key]:
            what = f"{before[key]!r} and {after[key]!r}"
            if key == "dataset_fingerprint":
                what = f"fingerprints {str(before[key])[:12]} and {str(after[key])[:12]}"
            raise EvaluationError(
                f"column {task}: the two runs have different {name}: {what}.",
                "They did not take the same test: evaluate both with the same task files and data.",
            )


def _require_same_limit(first: Results, second: Results) -> None:
    limits = [results.summary["settings"]["limit"] for results in (first, second)]
    if limits[0] != limits[1]:
        raise EvaluationError(
            f"the two runs have different limits: {limits[0]} in {first.path}, "
            f"{limits[1]} in {second.path}.",
            "Evaluate both with the same --limit, or both without.",
        )


def _warnings(first: Results, second: Results, columns: Sequence[ColumnComparison]) -> list[str]:
    found = []
    before, after = first.summary, second.summary
    if before["model"]["tower_fingerprint"] == after["model"]["tower_fingerprint"]:
        found.append("Both runs used the same vision tower.")
    if before["model"]["adapter"] != after["model"]["adapter"]:
        found.append("The runs used different adapters, so prompts and preprocessing may differ.")
    for key in ("dtype", "device", "seed"):
        values = [summary["settings"].get(key) for summary in (before, after)]
        if values[0] != values[1]:
            found.append(
                f"The runs differ in {key} ({values[0]} and {values[1]}), which changes answers "
                "by itself."
            )
    fewshot = [summary.get("fewshot") or {} for summary in (before, after)]
    for key in ("compat", "demonstrations", "length_penalty"):
        values = [settings.get(key) for settings in fewshot]
        if all(fewshot) and values[0] != values[1]:
            found.append(
                f"The few-shot settings differ in {key} ({values[0]} and {values[1]}): these are "
                "two protocols."
            )
    for library in ("transformers", "torch", "lmms_eval", "pillow"):
        versions = [summary["versions"].get(library) for summary in (before, after)]
        if versions[0] != versions[1]:
            found.append(f"The runs used {library} {versions[0]} and {versions[1]}.")
    if before["settings"]["limit"] is not None:
        found.append(
            f"Only the first {before['settings']['limit']} documents of each task were used: "
            "no benchmark score."
        )
    for column in columns:
        if column.dropped:
            found.append(
                f"{column.task}: {len(column.dropped)} questions that one of the runs did not "
                "answer are left out of both."
            )
    return found


def _describe(results: Results) -> dict[str, Any]:
    return {
        "path": str(results.path),
        "model": dict(results.summary["model"]),
        "created": results.summary["created"],
    }


def _key(task: str) -> list[int]:
    return list(task.encode())
