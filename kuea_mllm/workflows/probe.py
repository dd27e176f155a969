"""What a vision tower can do by itself: the `probe` command.

OUT/                    of one tower: a results directory (see `evaluation.results`)
    recipes/<suite>.yaml    the resolved recipes
    report.html             scores, the paper's tables beside them, pictures to look at
OUT/                    of two towers (--against)
    baseline/, candidate/   results of each
    comparison.json         written last
    report.html
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from kuea_mllm.config.probe import SUITES, ProbeRecipe
from kuea_mllm.config.recipes import recipe_to_yaml
from kuea_mllm.errors import OutputError, RecipeError, UserError
from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.evaluation.results import KIND, SCHEMA_VERSION, load_results
from kuea_mllm.evaluation.unfinished import (
    COLUMN,
    Identity,
    Unfinished,
    open_unfinished,
    require_startable,
    unfinished_path,
)
from kuea_mllm.io import atomic_directory, create_directory, read_json, write_json, write_text
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import library_versions, utc_now
from kuea_mllm.reporting.comparison import write_comparison_report
from kuea_mllm.reporting.results_report import write_results_report
from kuea_mllm.workflows.against import (
    BASELINE,
    CANDIDATE,
    COMPARISON,
    HALVES,
    REPORT,
    require_pair_startable,
)
from kuea_mllm.workflows.probe_inputs import require_same_inputs
from kuea_mllm.workflows.probe_results import (
    SUITE_PREFIX,
    THUMBNAILS,
    result_columns,
    write_columns,
)
from kuea_mllm.workflows.probe_subject import Subject, open_subject
from kuea_mllm.workflows.probe_suites import (
    NEEDS_TEXT,
    Job,
    ProbePlace,
    job_inputs,
    open_all,
    require_data,
    run_job,
)

LIMIT_RULE = "N images of each data set, spread evenly over it"
# What changes speed, and numbers by rounding at most.
_FREE = frozenset(("batch_size", "device"))
# What differs between copies of one tower.
_OF_A_COPY = frozenset(("source", "layout", "description"))


@dataclass(frozen=True)
class Probing:
    """Everything but the towers.

    Attributes:
        jobs: Data sets and how they are scored, see `plan_jobs`.
        place: Where data sets lie and where the work is done.
        base: A whole CLIP to take the text tower from; None finds it.
        activation: For checkpoint files, which do not state it.
        heads: Likewise.
        teacher: Of a projection, where its teacher lies by now.
        command: The command line, for the record.
        thumbnails: Pictures of each data set that are kept for reports.
    """

    jobs: Sequence[Job]
    place: ProbePlace
    base: str | None = None
    activation: str | None = None
    heads: int | None = None
    teacher: str | None = None
    command: str | None = None
    thumbnails: int = THUMBNAILS

    @property
    def recipes(self) -> dict[str, ProbeRecipe]:
        """The recipe of each suite."""
        return {job.recipe.suite: job.recipe for job in self.jobs}

    def open(self, reference: str) -> Subject:
        """Load a tower and all that the suites need of it, before the first picture is embedded.

        Raises:
            TowerError: If it cannot be opened, or lacks something: a projection, a text tower,
                patch tokens.
        """
        subject = open_subject(
            reference,
            base=self.base,
            activation=self.activation,
            heads=self.heads,
            teacher=self.teacher,
            device=self.place.device,
        )
        if NEEDS_TEXT.intersection(self.recipes):
            _ = subject.partner
        for job in self.jobs:
            if job.recipe.suite == "patch":
                subject.tokens()
            else:
                subject.embedder(job.faults)
        return subject


def probe(
    reference: str, how: Probing, out: Path, *, resume: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Score one tower and write a results directory.

    Data sets are looked for before the tower is loaded, and local ones are opened before the first
    is scored. They are scored one after the other; what ends the command early leaves those that
    are finished in `OUT.unfinished`, and embeddings in the cache in any case.

    Args:
        reference: The tower, see `open_subject`.
        how: What to do.
        out: Directory to create.
        resume: Go on with what lies unfinished; must be of the same recipes and tower.
        restart: Drop what lies unfinished.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: If the request cannot be carried out; `out` is not written.
        EnvironmentFailure: If the disk is full.
    """
    _require_jobs(how.jobs)
    require_startable(out, resume=resume, restart=restart)
    require_data(how.jobs, how.place.data)
    started = time.monotonic()
    identity = Identity(_identity(how), probe_versions())
    with open_unfinished(out, identity, resume=resume, restart=restart) as kept:
        subject = how.open(reference)
        model = subject.describe()
        kept.claim(_model_key(model))
        # All, before hours are spent on the one that is next.
        opened = open_all(how.jobs, subject, how.place)
        for job in how.jobs:
            if kept.is_finished(job.name):
                before = read_json(kept.column(job.name) / COLUMN).get("inputs", {})
                now = opened.get(job.name) or job_inputs(job, subject, how.place)
                require_same_inputs(job.data.name, before, now)
        for number, job in enumerate(how.jobs, start=1):
            _run_job(number, job, subject, how, kept)
        records = {job.name: read_json(kept.column(job.name) / COLUMN) for job in how.jobs}
        summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "model": {**model, "files_fingerprint": None},
            "model_record": subject.record(),
            "columns": {
                task: entry
                for found in records.values()
                for task, entry in found["entries"].items()
            },
            "inputs": {name: found["inputs"] for name, found in records.items()},
            "settings": _settings(how),
            "versions": probe_versions(),
            "created": utc_now(),
            "command": how.command,
            "seconds": round(time.monotonic() - started, 1),
        }
        _write_results(out, kept, summary, how)
        try:
            write_results_report(out / REPORT, out)
        except BaseException:
            # A full disk, say: with --resume it is all made again from the finished columns.
            shutil.rmtree(out, ignore_errors=True)
            raise
    LOGGER.info("Results written to %s.", out)
    return summary


def probe_pair(
    candidate: str,
    baseline: str,
    how: Probing,
    out: Path,
    *,
    resume: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Score two towers on the same data and compare them, picture by picture.

    Args:
        candidate: The tower that is asked about.
        baseline: The tower that it is compared with.
        how: What to do.
        out: Directory to create.
        resume: Keep a finished half and go on with the other.
        restart: Drop what lies in `out`.

    Returns:
        The content of `comparison.json`.

    Raises:
        UserError: If a finished half is of other recipes, another tower or library version.
    """
    _require_jobs(how.jobs)
    require_pair_startable(out, resume=resume, restart=restart)
    require_data(how.jobs, how.place.data)
    for reference in (baseline, candidate):
        # Both, before the first of them is probed for hours.
        how.open(reference)
    if restart and out.exists():
        shutil.rmtree(out)
    created = create_directory(out)
    try:
        for half, reference in zip(HALVES, (baseline, candidate), strict=True):
            folder = out / half
            if folder.is_dir():
                _require_same(half, folder, reference, how)
                LOGGER.info("%s: finished before, kept.", half.capitalize())
                continue
            LOGGER.info("%s: %s.", half.capitalize(), reference)
            probe(reference, how, folder, resume=unfinished_path(folder).exists())
    except BaseException:
        if created is not None and not any(out.iterdir()):
            out.rmdir()
        raise
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


def probe_versions() -> dict[str, str]:
    """Return the versions of libraries that scores may depend on."""
    return {**library_versions(), "clip_benchmark": version("clip-benchmark")}


def _require_jobs(jobs: Sequence[Job]) -> None:
    if not jobs:
        raise RecipeError("nothing to probe.", "Give --suite or --recipe.")


def _run_job(number: int, job: Job, subject: Subject, how: Probing, kept: Unfinished) -> None:
    if kept.is_finished(job.name):
        LOGGER.info("Data set %d of %d, %s: finished before.", number, len(how.jobs), job.name)
        return
    LOGGER.info("Data set %d of %d: %s (%s).", number, len(how.jobs), job.data.name, job.name)
    is_checked = how.place.data is not None  # by `open_all`
    place = replace(how.place, kept=kept.work(job.name), is_checked=is_checked)
    found = run_job(job, subject, place)
    columns = result_columns(job, found)
    with atomic_directory(kept.column(job.name)) as folder:
        entries = write_columns(folder, columns, found, thumbnails=how.thumbnails)
        write_json(folder / COLUMN, {"entries": entries, "inputs": dict(found.inputs)})
    shutil.rmtree(kept.work(job.name), ignore_errors=True)


def _write_results(out: Path, kept: Unfinished, summary: Mapping[str, Any], how: Probing) -> None:
    with atomic_directory(out) as folder:
        for job in how.jobs:
            shutil.copytree(
                kept.column(job.name),
                folder,
                ignore=shutil.ignore_patterns(COLUMN),
                dirs_exist_ok=True,
            )
        (folder / "recipes").mkdir()
        for suite, recipe in how.recipes.items():
            write_text(folder / "recipes" / _recipe_file(suite), recipe_to_yaml(recipe))
        write_json(folder / "summary.json", summary)


def _settings(how: Probing) -> dict[str, Any]:
    recipes = list(how.recipes.values())
    suites = [recipe.suite for recipe in recipes]
    return {
        "batch_size": _common([recipe.batch_size for recipe in recipes]),
        "limit": _common([recipe.limit for recipe in recipes]),
        "limit_seed": None,
        "limit_rule": LIMIT_RULE,
        "limit_spread": True,
        "suite": SUITE_PREFIX + ("all" if len(suites) == len(SUITES) else "+".join(suites)),
        "protocol": _common([recipe.compat for recipe in recipes]),
        "judge": None,
        "backend": None,
        "dtype": _common([recipe.dtype for recipe in recipes]),
        "device": how.place.device,
        "seed": _common([recipe.seed for recipe in recipes]),
        "max_failures": 0,
        "processes": 1,
        "base": how.base,
        "datasets": [job.name for job in how.jobs],
        "data": None if how.place.data is None else str(how.place.data),
    }


def _model_key(model: Mapping[str, Any]) -> str:
    """Hash what is known of a tower: its fingerprint is of weights, and of the body only."""
    about = {**model["tower"], "fingerprint": model["tower_fingerprint"]}
    content = {key: value for key, value in about.items() if key not in _OF_A_COPY}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _common(values: Sequence[Any]) -> Any:
    """Return the one value, or all of them as a text."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else ", ".join(map(str, distinct))


def _identity(how: Probing) -> dict[str, Any]:
    recipes = {suite: recipe.model_dump(mode="json") for suite, recipe in how.recipes.items()}
    return {
        **{f"recipes.{suite}": _fixed(content) for suite, content in recipes.items()},
        "datasets": [job.name for job in how.jobs],
        "base": how.base,
        "data": None if how.place.data is None else str(how.place.data.resolve()),
    }


def _fixed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in _FREE}


def _recipe_file(suite: str) -> str:
    return f"{suite.replace('-', '_')}.yaml"


def _require_same(half: str, folder: Path, reference: str, how: Probing) -> None:
    """Make sure that a finished half is what it would become now."""
    remedy = "Set it back, or drop both halves with --restart."
    summary = load_results(folder).summary
    for suite, recipe in how.recipes.items():
        path = folder / "recipes" / _recipe_file(suite)
        if not path.is_file():
            raise OutputError(f"the finished {half} {folder} lacks the suite {suite}.", remedy)
        before = _fixed(yaml.safe_load(path.read_text(encoding="utf-8")))
        now = _fixed(recipe.model_dump(mode="json"))
        for key in now:
            if before.get(key) != now[key]:
                raise RecipeError(
                    f"--resume: key '{key}' of the recipe of suite {suite} is not that of the "
                    f"finished {half} {folder}.",
                    remedy,
                )
    settings = {"base": how.base, "datasets": [job.name for job in how.jobs]}
    for key, value in settings.items():
        if summary["settings"].get(key) != value:
            raise UserError(
                f"--resume: {key} is {value!r}, and the finished {half} {folder} was made with "
                f"{summary['settings'].get(key)!r}.",
                remedy,
            )
    subject = how.open(reference)
    now_key, key_before = (_model_key(each) for each in (subject.describe(), summary["model"]))
    if now_key != key_before:
        raise UserError(
            f"--resume: {reference} is not the tower of the finished {half} {folder} (fingerprint "
            f"of weights and configuration {now_key[:16]}, was {key_before[:16]}).",
            "Give it the same tower, or drop both halves with --restart.",
        )
    for name, now_version in probe_versions().items():
        if summary["versions"].get(name) != now_version:
            raise UserError(
                f"--resume: {name} is {now_version}, and the finished {half} was run with "
                f"{summary['versions'].get(name)}.",
                "Install that version again, or drop both halves with --restart.",
            )
    for job in how.jobs:
        before = summary.get("inputs", {}).get(job.name, {})
        require_same_inputs(job.data.name, before, job_inputs(job, subject, how.place))
