"""Comparing results directories, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.comparing.average import AverageComparison, compare_average
from kuea_mllm.evaluation.comparing.pairing import ColumnComparison, compare_column
from kuea_mllm.evaluation.comparing.resampling import LEVEL
from kuea_mllm.evaluation.comparing.same_test import (
    pair_warnings,
    require_one_kind,
    require_same_settings,
    require_same_test,
    shared_tasks,
)
from kuea_mllm.evaluation.comparing.stats import ALPHA, Verdict, decide, holm_adjust
from kuea_mllm.evaluation.comparing.systems import System, pair_runs, setting
from kuea_mllm.evaluation.results import load_results

KIND = "comparison"
KIND_OF_SEVERAL = "comparisons"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same questions.

    Attributes:
        baseline: The first system.
        candidate: The second system; differences are candidate minus baseline.
        columns: Comparison per task.
        average: Comparison of the mean over all columns that can be averaged.
        average_unjudged: The same without the columns that a judge scored; None if none was.
        averages: The same for each part of the columns, such as the numbers of shots.
        only_in_baseline: Columns left out because the candidate lacks them.
        only_in_candidate: Columns left out because the baseline lacks them.
        warnings: What a reader should know about the pair.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
    """

    baseline: System
    candidate: System
    columns: Mapping[str, ColumnComparison]
    average: AverageComparison | None
    average_unjudged: AverageComparison | None
    averages: Mapping[str, AverageComparison]
    only_in_baseline: tuple[str, ...]
    only_in_candidate: tuple[str, ...]
    warnings: tuple[str, ...]
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Write the comparison as strict JSON values (no NaN)."""
        first = self.baseline.first
        unjudged = self.average_unjudged
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "baseline": self.baseline.to_json(),
            "candidate": self.candidate.to_json(),
            "settings": {
                "resamples": self.resamples,
                "seed": self.seed,
                "level": LEVEL,
                "alpha": ALPHA,
                "limit": setting(first, "limit"),
                "limit_seed": setting(first, "limit_seed"),
                "limit_spread": bool(setting(first, "limit_spread")),
                "suite": setting(first, "suite"),
                "protocols": sorted({column.protocol for column in self.columns.values()}),
            },
            "columns": {task: column.to_json() for task, column in self.columns.items()},
            "average": None if self.average is None else self.average.to_json(),
            "average_unjudged": None if unjudged is None else unjudged.to_json(),
            "averages": {part: average.to_json() for part, average in self.averages.items()},
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
    """Compare two runs of `eval`; see `compare_systems`."""
    systems = [System(None, (load_results(path),)) for path in (baseline, candidate)]
    (found,) = compare_systems(systems, resamples=resamples, seed=seed, common_only=common_only)
    return found


def compare_systems(
    systems: Sequence[System],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    common_only: bool = False,
) -> list[Comparison]:
    """Compare the first system with each of the others.

    Args:
        systems: Baseline and candidates.
        resamples: Bootstrap resamples per column.
        seed: Seed of the bootstrap.
        common_only: Leave out columns that only one of the runs has, instead of refusing.

    Raises:
        EvaluationError: If the runs did not answer the same questions under the same rules, which
            is found for all of them before the first is compared.
    """
    if resamples < 100:
        raise EvaluationError(
            f"{resamples} resamples are too few for a 95 % interval.", "Use 10,000."
        )
    baseline, *candidates = systems
    plans = []
    for candidate in candidates:
        pairs = pair_runs(baseline, candidate)
        runs = [*baseline.runs, *candidate.runs]
        # What differs most is named first: runs of other suites differ in much else besides.
        require_one_kind(runs)
        tasks = shared_tasks(runs, common_only=common_only)
        require_same_settings(runs)
        for task in tasks:
            require_same_test(task, pairs)
        plans.append((candidate, pairs, tasks))
    found = []
    for candidate, pairs, tasks in plans:
        columns = _with_verdicts(
            [
                # A stream of its own for each column, so that a column's numbers do not depend on
                # the others.
                compare_column(
                    task,
                    pairs,
                    resamples=resamples,
                    seed=np.random.SeedSequence([seed, *task.encode()]),
                )
                for task in tasks
            ]
        )
        # Where judged columns are missing, both averages would be the same.
        is_judged = any(column.judged and column.difference is not None for column in columns)
        found.append(
            Comparison(
                baseline=baseline,
                candidate=candidate,
                columns={column.task: column for column in columns},
                average=compare_average(columns),
                average_unjudged=compare_average(columns, judged=False) if is_judged else None,
                averages=_averages(columns),
                only_in_baseline=_others(baseline, tasks),
                only_in_candidate=_others(candidate, tasks),
                warnings=tuple(_warnings(baseline, candidate, columns, len(candidates))),
                resamples=resamples,
                seed=seed,
            )
        )
    return found


def comparisons_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Write one comparison as it is, several under one baseline."""
    if len(comparisons) == 1:
        return comparisons[0].to_json()
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND_OF_SEVERAL,
        "baseline": comparisons[0].baseline.to_json(),
        "pairs": [comparison.to_json() for comparison in comparisons],
    }


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


def _averages(columns: Sequence[ColumnComparison]) -> dict[str, AverageComparison]:
    parts = dict.fromkeys(column.part for column in columns if column.part is not None)
    found = {
        part: compare_average([column for column in columns if column.part == part])
        for part in parts
    }
    return {part: average for part, average in found.items() if average is not None}


def _others(system: System, tasks: Sequence[str]) -> tuple[str, ...]:
    names = dict.fromkeys(task for run in system.runs for task in run.columns)
    return tuple(name for name in names if name not in tasks)


def _remarks(label: str, system: System) -> list[str]:
    """Say what has to be known about a system's scores; the same of several columns only once."""
    columns: dict[str, dict[str, None]] = {}
    for run in system.runs:
        for entry in run.summary["columns"].values():
            for remark in entry.get("remarks") or ():
                columns.setdefault(remark, {})[entry["column"]] = None
    return [f"{label}, {', '.join(names)}: {remark}." for remark, names in columns.items()]


def _warnings(
    baseline: System, candidate: System, columns: Sequence[ColumnComparison], candidates: int
) -> list[str]:
    pairs = pair_runs(baseline, candidate)
    found = list(dict.fromkeys(text for pair in pairs for text in pair_warnings(*pair)))
    limit, limit_seed = (setting(baseline.first, key) for key in ("limit", "limit_seed"))
    if limit is not None:
        which = "first" if limit_seed is None else "randomly drawn"
        if setting(baseline.first, "limit_spread"):
            which = "evenly spread"
        drawn = "" if limit_seed is None else f" (seed {limit_seed})"
        found.append(
            f"Only the {which} {limit} documents of each task were used{drawn}: no benchmark score."
        )
    for side, system in (("baseline", baseline), ("candidate", candidate)):
        found += _remarks(system.label or side, system)
    for column in columns:
        if column.dropped:
            found.append(
                f"{column.column}: {len(column.dropped)} questions that one of the runs did not "
                "answer are left out of both."
            )
    if candidates > 1:
        found.append(
            f"One of {candidates} candidates: p is adjusted for the columns of this one alone."
        )
    return found
