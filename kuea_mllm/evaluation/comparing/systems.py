"""The systems of a comparison: one model, or the runs of several seeds under one label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.results import Results, load_results


@dataclass(frozen=True)
class System:
    """What is compared.

    Attributes:
        label: Name given to it; None takes the name of the model.
        runs: Its results, one for each seed.
    """

    label: str | None
    runs: tuple[Results, ...]

    @property
    def first(self) -> Results:
        """The first run, which stands for the others where only one can be shown."""
        return self.runs[0]

    def to_json(self) -> dict[str, Any]:
        """Describe the system."""
        summary = self.first.summary
        return {
            "label": self.label,
            "path": str(self.first.path),
            "model": dict(summary["model"]),
            "created": summary["created"],
            "runs": [
                {
                    "path": str(run.path),
                    "model": dict(run.summary["model"]),
                    "created": run.summary["created"],
                }
                for run in self.runs
            ],
        }


def split_arguments(arguments: Sequence[str]) -> list[tuple[str | None, list[Path]]]:
    """Gather `DIR` and `LABEL=DIR` by system; a directory without a label is one of its own.

    An existing directory whose name has an equals sign in it is taken as it is.

    Returns:
        Label and directories of each system; the first is the baseline.

    Raises:
        EvaluationError: If there is nothing to compare with, or a directory is given twice.
    """
    systems: list[tuple[str | None, list[Path]]] = []
    labelled: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    for argument in arguments:
        label, separator, rest = argument.partition("=")
        is_labelled = bool(separator and label) and not Path(argument).exists()
        path = Path(rest if is_labelled else argument)
        if path.resolve() in seen:
            raise EvaluationError(
                f"results {path} are given twice.", "Give each run once: nothing would differ."
            )
        seen.add(path.resolve())
        if label in labelled and is_labelled:
            labelled[label].append(path)
            continue
        systems.append((label if is_labelled else None, [path]))
        if is_labelled:
            labelled[label] = systems[-1][1]
    if len(systems) < 2:
        given = (
            f"all results have the label {systems[0][0]!r}"
            if labelled
            else f"{len(systems)} results directory is given"
        )
        raise EvaluationError(
            f"{given}: there is nothing to compare with.",
            "Give the baseline and what is compared with it: base=DIR base=DIR new=DIR new=DIR.",
        )
    return systems


def load_systems(arguments: Sequence[str]) -> list[System]:
    """Open what `split_arguments` found; models of one name go by their directories.

    Raises:
        EvaluationError: If a directory holds no results of this version.
    """
    systems = [
        System(label, tuple(load_results(path) for path in paths))
        for label, paths in split_arguments(arguments)
    ]
    names = Counter(system.label or system.first.summary["model"]["name"] for system in systems)
    return [
        replace(system, label=str(system.first.path))
        if system.label is None and names[system.first.summary["model"]["name"]] > 1
        else system
        for system in systems
    ]


def pair_runs(baseline: System, candidate: System) -> list[tuple[Results, Results]]:
    """Pair the runs of two systems in order; a baseline of one run stands against all.

    Raises:
        EvaluationError: If the numbers of runs do not go together.
    """
    first, second = baseline.runs, candidate.runs
    if len(first) == 1:
        return [(first[0], run) for run in second]
    if len(first) != len(second):
        raise EvaluationError(
            f"the baseline has {len(first)} runs ({_paths(first)}), the candidate {len(second)} "
            f"({_paths(second)}).",
            "Runs of seeds are paired in order: give as many of each, or one of the baseline.",
        )
    return list(zip(first, second, strict=True))


def setting(results: Results, key: str) -> Any:
    """Return a setting of a run; None where the run did not record it."""
    settings: Mapping[str, Any] = results.summary["settings"]
    return settings.get(key)


def _paths(runs: Sequence[Results]) -> str:
    return ", ".join(str(run.path) for run in runs)
