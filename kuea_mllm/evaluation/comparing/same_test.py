"""Whether runs took the same test: what is refused, and what is only said."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.comparing.systems import setting
from kuea_mllm.evaluation.results import Results

EVALUATION, PROBE = "eval", "probe"
"""The two verbs whose results can be compared, each with its own kind."""

# The suites of `probe` begin so; the results of both verbs are alike otherwise.
_PROBE_SUITE = "probe-"

_SAME_FILES = "They did not take the same test: evaluate both with the same task files and data."
_SAME_PROTOCOL = "Evaluate both with the same --protocol."
# What differs between probes has other causes.
_REMEDIES_OF_PROBES = {
    _SAME_FILES: "They did not take the same test: probe both with the same recipe and data.",
    _SAME_PROTOCOL: "Probe both with the same --compat.",
}

# What makes two columns different tests: its name in the message and what to do.
_MUST_AGREE = {
    "protocol": ("protocols", _SAME_PROTOCOL),
    "version": ("task versions", _SAME_FILES),
    "metric": ("metrics", _SAME_FILES),
    "filter": ("answer filters", _SAME_FILES),
    "split": ("splits", _SAME_FILES),
    "statistic": ("statistics", _SAME_FILES),
    "judged": ("ways of scoring (by a judge or not)", _SAME_FILES),
    "higher_is_better": ("directions of the metric", _SAME_FILES),
}
# What the two runs of a pair have in common, and the runs of different seeds need not.
_MUST_AGREE_IN_PAIR = {
    "n": ("numbers of samples", _SAME_FILES),
    "dataset_fingerprint": ("sample sets (documents, questions or answers)", _SAME_FILES),
}
_FEWSHOT = ("compat", "demonstrations", "length_penalty")
# The address of a judge may change, its name and its instructions may not.
_JUDGE = ("model", "temperature", "prompt")


def run_kind(run: Results) -> str:
    """Return the verb that results are of."""
    return PROBE if str(setting(run, "suite") or "").startswith(_PROBE_SUITE) else EVALUATION


def require_one_kind(runs: Sequence[Results]) -> None:
    """Refuse results of models beside results of towers.

    Raises:
        EvaluationError: Naming one of each.
    """
    for first, second in pairwise(runs):
        if run_kind(first) != run_kind(second):
            raise EvaluationError(
                f"{first.path} holds results of `kuea-mllm {run_kind(first)}`, {second.path} of "
                f"`kuea-mllm {run_kind(second)}`: they have nothing to compare.",
                "Compare evaluations of models with each other, and probes of towers likewise.",
            )


def require_same_settings(runs: Sequence[Results]) -> None:
    """Refuse runs with other limits or other few-shot protocols.

    Raises:
        EvaluationError: Naming what differs and where.
    """
    for first, second in pairwise(runs):
        for key, name, flag in (
            ("limit", "limits", "--limit"),
            ("limit_seed", "seeds of the limit", "--limit-seed"),
        ):
            values = setting(first, key), setting(second, key)
            # Runs that ask everything may have been given a seed, which then decides nothing.
            if values[0] != values[1] and (key == "limit" or setting(first, "limit") is not None):
                _refuse(
                    "the two runs",
                    name,
                    (first, values[0]),
                    (second, values[1]),
                    f"{_verb(first)} both with the same {flag}, or both without.",
                )
        fewshot = [run.summary.get("fewshot") or {} for run in (first, second)]
        for key in _FEWSHOT if all(fewshot) else ():
            values = fewshot[0].get(key), fewshot[1].get(key)
            if values[0] != values[1]:
                _refuse(
                    "the two runs",
                    f"few-shot protocols ({key})",
                    (first, values[0]),
                    (second, values[1]),
                    "Evaluate both with the same few-shot settings.",
                )


def shared_tasks(runs: Sequence[Results], *, common_only: bool) -> list[str]:
    """Return the columns that all runs have.

    Raises:
        EvaluationError: If a run has others too and `common_only` is not set, if one column was
            asked by two protocols, or if nothing is shared (naming the suites, if they differ).
    """
    shared = [task for task in runs[0].columns if all(task in run.columns for run in runs)]
    lonely = {str(run.path): [task for task in run.columns if task not in shared] for run in runs}
    if not shared:
        _require_one_protocol(runs)
        _require_one_suite(runs)
    if any(lonely.values()) and not common_only:
        _require_one_protocol(runs)
        texts = [f"{', '.join(tasks)} only in {path}" for path, tasks in lonely.items() if tasks]
        raise EvaluationError(
            f"the two runs have different columns: {'; '.join(texts)}.",
            "Evaluate the missing tasks too, or pass --common-only to leave them out."
            if run_kind(runs[0]) == EVALUATION
            else "Probe the missing data sets too, or pass --common-only to leave them out.",
        )
    if not shared:
        raise EvaluationError(
            f"results {' and '.join(str(run.path) for run in runs)} have no column in common.",
            f"{_verb(runs[0])} both {_subjects(runs[0])}.",
        )
    return shared


def require_same_test(task: str, pairs: Sequence[tuple[Results, Results]]) -> None:
    """Refuse runs that asked or scored a column in different ways.

    Raises:
        EvaluationError: Naming the column, what differs and where.
    """
    for first, second in pairs:
        _require_agreement(task, first, second, {**_MUST_AGREE, **_MUST_AGREE_IN_PAIR})
        _require_same_judge(task, first, second)
    for (earlier, _), (later, _) in pairwise(pairs):
        _require_agreement(task, earlier, later, _MUST_AGREE)
        _require_same_judge(task, earlier, later)


def pair_warnings(first: Results, second: Results) -> list[str]:
    """Say what differs between two runs and may change answers by itself."""
    found = []
    before, after = first.summary, second.summary
    towers = [summary["model"]["tower_fingerprint"] for summary in (before, after)]
    if None in towers:
        found.append("Which vision tower was at work cannot be proven: a backend does not show it.")
    elif towers[0] == towers[1]:
        found.append("Both runs used the same vision tower.")
    if before["model"]["adapter"] != after["model"]["adapter"]:
        found.append("The runs used different adapters, so prompts and preprocessing may differ.")
    for key in ("backend", "dtype", "device", "seed"):
        values = setting(first, key), setting(second, key)
        if values[0] != values[1]:
            found.append(
                f"The runs differ in {key} ({values[0]} and {values[1]}), which changes answers "
                "by itself."
            )
    for library in ("transformers", "torch", "lmms_eval", "pillow"):
        versions = [summary["versions"].get(library) for summary in (before, after)]
        if versions[0] != versions[1]:
            found.append(f"The runs used {library} {versions[0]} and {versions[1]}.")
    return found


def _require_agreement(
    task: str, first: Results, second: Results, keys: dict[str, tuple[str, str]]
) -> None:
    before, after = first.columns[task], second.columns[task]
    for key, (name, remedy) in keys.items():
        values = before[key], after[key]
        if values[0] != values[1]:
            shown = [str(value)[:12] if key == "dataset_fingerprint" else value for value in values]
            _refuse(
                f"column {task}: the two runs", name, (first, shown[0]), (second, shown[1]), remedy
            )


def _require_same_judge(task: str, first: Results, second: Results) -> None:
    columns = first.columns[task], second.columns[task]
    if not columns[0]["judged"] or any(column["missing"] for column in columns):
        return
    judges = [setting(run, "judge") or {} for run in (first, second)]
    for key in _JUDGE:
        values = judges[0].get(key), judges[1].get(key)
        if values[0] != values[1]:
            _refuse(
                f"column {task}: the two runs",
                f"judges ({key})",
                (first, values[0]),
                (second, values[1]),
                "Judge both with the same model, temperature and prompts.",
            )


def _require_one_protocol(runs: Sequence[Results]) -> None:
    """Say that protocols differ, where tasks have other names because of that."""
    for first, second in pairwise(runs):
        known = {entry["column"]: entry["protocol"] for entry in first.columns.values()}
        for task, entry in second.columns.items():
            protocol = known.get(entry["column"], entry["protocol"])
            if task not in first.columns and protocol != entry["protocol"]:
                _refuse(
                    f"column {entry['column']}: the two runs",
                    "protocols",
                    (first, protocol),
                    (second, entry["protocol"]),
                    _MUST_AGREE["protocol"][1],
                )


def _require_one_suite(runs: Sequence[Results]) -> None:
    """Say that suites differ, where that is why nothing is shared."""
    for first, second in pairwise(runs):
        suites = setting(first, "suite"), setting(second, "suite")
        if suites[0] != suites[1]:
            _refuse(
                "the two runs",
                "suites, and no column in common",
                (first, suites[0]),
                (second, suites[1]),
                f"{_verb(first)} both with the same --suite.",
            )


def _verb(run: Results) -> str:
    return "Probe" if run_kind(run) == PROBE else "Evaluate"


def _subjects(run: Results) -> str:
    is_probe = run_kind(run) == PROBE
    return "towers on the same data sets" if is_probe else "models on the same tasks"


def _refuse(
    subject: str, name: str, first: tuple[Results, Any], second: tuple[Results, Any], remedy: str
) -> None:
    (one, value), (other, value_there) = first, second
    raise EvaluationError(
        f"{subject} have different {name}: {value!r} in {one.path / 'summary.json'}, "
        f"{value_there!r} in {other.path / 'summary.json'}.",
        _REMEDIES_OF_PROBES.get(remedy, remedy) if run_kind(one) == PROBE else remedy,
    )
