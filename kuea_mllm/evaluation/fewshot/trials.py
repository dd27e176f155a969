"""Mean and spread over the trials of each data set and number of shots."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kuea_mllm.evaluation.fewshot.task_files import FewShotTask


def summarise_trials(
    tasks: Sequence[FewShotTask], columns: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Gather the trials of a run.

    Args:
        tasks: What was run.
        columns: Entries of `summary.json` by task.

    Returns:
        By data set and number of shots: `metric`, `seeds`, `scores` on a scale to 100, their `mean`
        and `std` (of a sample, n - 1; None for one trial).
    """
    groups: defaultdict[tuple[str, int], list[FewShotTask]] = defaultdict(list)
    for task in tasks:
        groups[task.dataset, task.shots].append(task)
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (dataset, shots), trials in groups.items():
        scores = [columns[trial.name]["score"] for trial in trials]
        is_complete = None not in scores
        summary.setdefault(dataset, {})[str(shots)] = {
            "metric": columns[trials[0].name]["metric"],
            "seeds": [trial.seed for trial in trials],
            "scores": scores,
            "mean": statistics.fmean(scores) if is_complete else None,
            "std": statistics.stdev(scores) if is_complete and len(scores) > 1 else None,
        }
    return summary
