"""Two models on the same questions in one go: `eval --model A --against B`.

OUT/
    baseline/, candidate/   results of B and of A (see `evaluation.results`)
    comparison.json         A minus B; written last
    report.html
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from kuea_mllm.errors import EnvironmentFailure, OutputError, RecipeError, UserError
from kuea_mllm.evaluation.answering.processes import (
    fail_together,
    from_zero,
    join_processes,
    process_number,
)
from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.evaluation.results import load_results
from kuea_mllm.evaluation.unfinished import FREE_KEYS, fingerprint_files, flatten, unfinished_path
from kuea_mllm.io import create_directory, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import library_versions
from kuea_mllm.reporting.comparison import write_comparison_report

BASELINE, CANDIDATE = "baseline", "candidate"
HALVES = (BASELINE, CANDIDATE)
COMPARISON, REPORT = "comparison.json", "report.html"

RunHalf = Callable[[Path, Path, bool], Mapping[str, Any]]
"""Evaluates a model into a directory; the flag says to go on with what lies unfinished there."""


def require_pair_startable(out: Path, *, resume: bool, restart: bool) -> None:
    """Refuse what cannot work, before anything is opened; writes nothing.

    Raises:
        OutputError: If the output is complete or not ours, or the options do not fit it.
    """
    if resume and restart:
        raise OutputError("--resume and --restart exclude each other.", "Give one of them.")
    if (out / COMPARISON).exists() or (out.exists() and not _is_ours(out)):
        raise OutputError(f"output {out} exists already.", "Choose another --out, or move it away.")
    if out.exists() and any(out.iterdir()) and not (resume or restart):
        raise OutputError(
            f"an unfinished comparison lies in {out}.",
            "Add --resume to go on with it, or --restart to drop it and begin anew.",
        )
    if resume and not out.exists():
        raise OutputError(
            f"there is nothing to resume: {out} does not exist.",
            "Leave out --resume to begin.",
        )


def evaluate_pair(
    models: Mapping[str, Path],
    out: Path,
    run: RunHalf,
    *,
    recipe: str,
    device: str,
    resume: bool,
    restart: bool,
) -> dict[str, Any] | None:
    """Evaluate the baseline and the candidate by the same recipe and compare them.

    Args:
        models: Model directory by half.
        out: Directory to create.
        run: Evaluates one of them.
        recipe: The recipe as YAML, which a finished half must have been run by.
        device: Where they run.
        resume: Keep finished halves and go on with the others.
        restart: Drop what lies in `out`.

    Returns:
        The comparison; None in processes that do not write.

    Raises:
        UserError: If a finished half is of another recipe, model or library version.
        EnvironmentFailure: If a half has more unanswered questions than the recipe allows.
    """
    join_processes(device)
    finished: dict[str, bool] = {}
    with fail_together():
        if process_number() == 0:
            require_pair_startable(out, resume=resume, restart=restart)
            if restart and out.exists():
                shutil.rmtree(out)
            create_directory(out)
            finished = {half: (out / half).is_dir() for half in HALVES}
            for half in HALVES:
                if finished[half]:
                    _require_same(half, out / half, models[half], recipe)
    finished = from_zero(finished)
    for half in HALVES:
        if finished[half]:
            LOGGER.info("%s: finished before, kept.", half.capitalize())
            continue
        LOGGER.info("%s: %s.", half.capitalize(), models[half])
        run(models[half], out / half, from_zero(unfinished_path(out / half).exists()))
    if process_number():
        return None
    comparison = compare_results(out / BASELINE, out / CANDIDATE).to_json()
    (out / REPORT).unlink(missing_ok=True)
    write_comparison_report(
        out / REPORT,
        comparison=comparison,
        baseline=out / BASELINE,
        candidate=out / CANDIDATE,
    )
    write_json(out / COMPARISON, comparison)
    return comparison


def _is_ours(out: Path) -> bool:
    known = {*HALVES, *(unfinished_path(Path(half)).name for half in HALVES), REPORT}
    # Hidden ones are what a killed process left behind.
    return out.is_dir() and all(e.name in known or e.name.startswith(".") for e in out.iterdir())


def _require_same(half: str, folder: Path, model: Path, recipe: str) -> None:
    """Make sure that a finished half is what it would become now."""
    remedy = "Set it back, or drop both halves with --restart."
    summary = load_results(folder).summary
    before, now = flatten(_read_recipe(folder)), flatten(yaml.safe_load(recipe))
    for key in sorted(before.keys() | now.keys()):
        if key not in FREE_KEYS and before.get(key) != now.get(key):
            raise RecipeError(
                f"--resume: key '{key}' is {now.get(key)!r}, and the finished {half} {folder} was "
                f"run with {before.get(key)!r}.",
                remedy,
            )
    # A backend's model may be a name.
    files = fingerprint_files(model) if model.is_dir() else str(model)
    known = summary["model"]["files_fingerprint"] or str(summary["model"]["path"])
    if known != files:
        raise UserError(
            f"--resume: model {model} is not that of the finished {half} {folder} (fingerprint of "
            f"its files {files[:16]}, was {known[:16]}).",
            "Give it the same files, or drop both halves with --restart.",
        )
    versions = {**library_versions(), "datasets": version("datasets")}
    changed = [name for name in versions if summary["versions"].get(name) != versions[name]]
    if changed:
        raise UserError(
            f"--resume: {changed[0]} is {versions[changed[0]]}, and the finished {half} was run "
            f"with {summary['versions'].get(changed[0])}.",
            "Install that version again, or drop both halves with --restart.",
        )
    failed = sum(column["failed"] for column in summary["columns"].values())
    allowed = int(yaml.safe_load(recipe)["max_failures"])
    if failed > allowed:
        raise EnvironmentFailure(
            f"{failed} questions of the finished {half} {folder} got no answer (allowed: "
            f"{allowed}).",
            f"Pass --set max_failures={failed} if that many are acceptable, or --restart.",
        )


def _read_recipe(folder: Path) -> dict[str, Any]:
    path = folder / "run.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(content, dict):
        raise OutputError(
            f"{folder} holds no recipe: run.yaml is missing.",
            "It was not made by `eval --against`; drop it with --restart.",
        )
    return content
