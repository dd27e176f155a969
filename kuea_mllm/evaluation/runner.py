"""Scoring one model directory on tasks of lmms-eval: the `eval` command."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kuea_mllm.adapters.records import read_record
from kuea_mllm.config.evaluate import FewShotSettings
from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.column_run import (
    RunOptions,
    gather_columns,
    read_columns,
    require_same_content,
    run_column,
)
from kuea_mllm.evaluation.fewshot.completion import Completer
from kuea_mllm.evaluation.fewshot.room import require_room
from kuea_mllm.evaluation.fewshot.task_files import FewShotTask, require_inputs, write_fewshot_tasks
from kuea_mllm.evaluation.fewshot.trials import summarise_trials
from kuea_mllm.evaluation.harness import require_one_process, stdout_to_stderr
from kuea_mllm.evaluation.loading import load_tasks
from kuea_mllm.evaluation.loguru_bridge import import_lmms_eval, lmms_log
from kuea_mllm.evaluation.opening import choose_adapter, choose_placement, open_session
from kuea_mllm.evaluation.results import KIND, SCHEMA_VERSION
from kuea_mllm.evaluation.session import Session
from kuea_mllm.evaluation.tasks import TaskSelection, resolve_tasks
from kuea_mllm.evaluation.unfinished import (
    LOG,
    Identity,
    Unfinished,
    fingerprint_files,
    open_unfinished,
    require_startable,
)
from kuea_mllm.io import atomic_directory, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import library_versions, utc_now

LIMIT_RULE = "first N documents of each task"


def evaluate(
    model_dir: Path,
    tasks: Sequence[str],
    out: Path,
    *,
    adapter: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    max_failures: int = 0,
    thumbnails: int = 48,
    command: str | None = None,
    show_progress: bool = True,
    recipe: str | None = None,
    fewshot: FewShotSettings | None = None,
    data: Mapping[str, str] | None = None,
    resume: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Score a model and write a results directory (see `kuea_mllm.evaluation.results`).

    Cheap mistakes are found first: output, arguments, model directory and task files are checked
    and data sets loaded before the weights are. Tasks are then run one after the other; what ends
    the evaluation early leaves those that are finished in `OUT.unfinished`.

    Args:
        model_dir: MLLM directory that an adapter can open.
        tasks: Names of lmms-eval tasks, task YAML files, or directories of them.
        out: Directory to create.
        adapter: Adapter to use; None finds the one that recognises the model.
        batch_size: Questions per forward pass.
        limit: Use the first N documents of each task (lmms-eval's rule, no random choice).
        dtype: "auto" (bfloat16 on CUDA, float32 elsewhere) or a number format.
        device: None or "auto" for the first GPU or else the CPU; otherwise exactly this one.
        seed: Seed of sampling and of few-shot choices.
        max_failures: Unanswered questions that are put up with.
        thumbnails: Documents per task whose image is kept for reports.
        command: The command line, for the record.
        show_progress: Whether a progress bar is drawn.
        recipe: The resolved recipe, kept as `run.yaml`.
        fewshot: Few-shot tasks to run beside `tasks`, which may then be empty.
        data: Folder of each of their data sets.
        resume: Go on with the unfinished evaluation of `out`, which must be of the same recipe,
            model and library versions.
        restart: Drop the unfinished evaluation of `out`, if there is one.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: If the request cannot be carried out; `out` is not written.
        EnvironmentFailure: If more than `max_failures` questions got no answer; the results are
            written all the same.
    """
    model_dir, out = Path(model_dir), Path(out)
    _require_counts(batch_size, limit, max_failures, thumbnails)
    require_one_process()
    require_startable(out, resume=resume, restart=restart)
    selection = resolve_tasks(tasks) if tasks or fewshot is None else TaskSelection({}, ())
    chosen = choose_adapter(model_dir, adapter)
    placement = choose_placement(device, dtype)
    if fewshot is not None:
        require_inputs(fewshot, data or {})
    versions = {**library_versions(), "datasets": version("datasets")}
    settings = {
        "adapter": chosen.name,
        "tasks": _describe_tasks(selection),
        "batch_size": batch_size,
        "limit": limit,
        "dtype": placement.dtype,
        "device": placement.device,
        "seed": seed,
        "max_failures": max_failures,
        "thumbnails": thumbnails,
        "fewshot": None if fewshot is None else fewshot.model_dump(mode="json"),
        "data": dict(data or {}),
    }
    started = time.monotonic()
    import_lmms_eval()
    with (
        open_unfinished(out, Identity(settings, versions), resume=resume, restart=restart) as kept,
        lmms_log(kept.path / LOG),
        _written_tasks(fewshot, data or {}, limit, placement.device) as written,
    ):
        jobs = _list_jobs(selection, written)
        kept.claim(fingerprint_files(model_dir))
        require_same_content(kept, written)
        session = open_session(chosen, model_dir, placement)
        session.show_progress = show_progress
        if fewshot is not None:
            session.completer = Completer(session.runtime, fewshot.cache_images)
            require_room(
                session.completer, [task for task in written if not kept.is_finished(task.name)]
            )
        options = RunOptions(model_dir, placement, batch_size, limit, seed, thumbnails)
        _run_jobs(jobs, written, session, options, kept)
        columns = read_columns(kept, list(jobs))
        summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "model": describe_model(model_dir, chosen.name, session.fingerprint),
            "columns": {name: column["entry"] for name, column in columns.items()},
            "settings": {
                "batch_size": batch_size,
                "limit": limit,
                "limit_rule": LIMIT_RULE,
                "dtype": placement.dtype,
                "device": placement.device,
                "seed": seed,
                "runtime": session.runtime.describe(),
            },
            "versions": versions,
            "created": utc_now(),
            "command": command,
            "seconds": round(time.monotonic() - started, 1),
        }
        if fewshot is not None:
            summary["fewshot"] = _describe_fewshot(written, columns, fewshot)
        with atomic_directory(out) as folder:
            gather_columns(kept, list(jobs), folder)
            write_json(folder / "summary.json", summary)
            if recipe is not None:
                (folder / "run.yaml").write_text(recipe, encoding="utf-8")
            (folder / LOG).write_bytes((kept.path / LOG).read_bytes())
    LOGGER.info("Results written to %s.", out)
    _require_few_failures(columns, max_failures, out)
    return summary


def _describe_tasks(selection: TaskSelection) -> dict[str, str]:
    """Return the tasks with a hash of each file, by which a resumed evaluation knows them."""
    files = {name: _hash_task(path) for name, path in selection.files.items()}
    return {**files, **dict.fromkeys(selection.stock, "of lmms-eval")}


def _hash_task(path: Path) -> str:
    """Hash a task file and the code beside it, where its functions are."""
    digest = hashlib.sha256()
    for file in (path, *sorted(path.parent.glob("*.py"))):
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@contextmanager
def _written_tasks(
    fewshot: FewShotSettings | None, data: Mapping[str, str], limit: int | None, device: str
) -> Iterator[list[FewShotTask]]:
    """Write the few-shot tasks for the time of the run; the data stay out of the results."""
    if fewshot is None:
        yield []
        return
    with TemporaryDirectory(prefix="kuea-mllm-fewshot-") as folder:
        yield write_fewshot_tasks(Path(folder), fewshot, data, limit=limit, device=device)


def _list_jobs(
    selection: TaskSelection, written: Sequence[FewShotTask]
) -> dict[str, Callable[[], Any]]:
    """Return the tasks in their order, each as what gives lmms-eval's object for it.

    Those that were asked for by name are loaded here, before a model is opened. The few-shot ones
    are known to load, and are loaded when their turn comes: one at a time in memory.
    """
    with stdout_to_stderr():
        given = load_tasks(selection) if selection.files or selection.stock else {}

    def load(task: FewShotTask) -> Any:
        with stdout_to_stderr():
            return load_tasks(TaskSelection({task.name: task.path}, ()))[task.name]

    # `pop`, because a task object holds all its requests and answers once it has run.
    jobs: dict[str, Callable[[], Any]] = {name: partial(given.pop, name) for name in given}
    return jobs | {task.name: partial(load, task) for task in written}


def _run_jobs(
    jobs: Mapping[str, Callable[[], Any]],
    written: Sequence[FewShotTask],
    session: Session,
    options: RunOptions,
    kept: Unfinished,
) -> None:
    fewshot = {task.name: task for task in written}
    for number, (name, load) in enumerate(jobs.items(), start=1):
        if kept.is_finished(name):
            LOGGER.info("Column %d of %d, %s: finished before.", number, len(jobs), name)
            continue
        LOGGER.info("Column %d of %d: %s.", number, len(jobs), name)
        with atomic_directory(kept.column(name)) as folder:
            run_column(name, load(), session, options, folder, fewshot=fewshot.get(name))


def _describe_fewshot(
    tasks: Sequence[FewShotTask],
    columns: Mapping[str, Mapping[str, Any]],
    settings: FewShotSettings,
) -> dict[str, Any]:
    return {
        "compat": settings.compat,
        "demonstrations": "random" if settings.retrieval is None else "retrieved",
        "length_penalty": settings.length_penalty,
        "trials": summarise_trials(
            tasks, {name: column["entry"] for name, column in columns.items()}
        ),
        "images_encoded": sum(column["images_encoded"] for column in columns.values()),
        "images_reused": sum(column["images_reused"] for column in columns.values()),
    }


def describe_model(model_dir: Path, adapter: str, fingerprint: str) -> dict[str, Any]:
    """Say which model was scored; `tower` is what `swap` recorded about its vision tower."""
    tower = read_record(model_dir).get("tower")
    if isinstance(tower, dict):
        tower = {key: value for key, value in tower.items() if isinstance(value, str | int | float)}
    elif isinstance(tower, str):
        tower = {"source": tower}
    else:
        tower = None
    return {
        "path": str(model_dir),
        "name": model_dir.resolve().name,
        "adapter": adapter,
        "tower_fingerprint": fingerprint,
        "tower": tower,
    }


def _require_few_failures(columns: Mapping[str, Any], allowed: int, out: Path) -> None:
    failed = sum(column["entry"]["failed"] for column in columns.values())
    if failed <= allowed:
        if failed:
            LOGGER.warning("%d questions got no answer (up to %d allowed).", failed, allowed)
        return
    name, (doc_id, error) = next(
        (name, column["first_failure"])
        for name, column in columns.items()
        if column["first_failure"] is not None
    )
    raise EnvironmentFailure(
        f"{failed} questions got no answer (allowed: {allowed}), the first one is document "
        f"{doc_id} of {name}: {(error or 'no answer').rstrip('.')}.",
        f"The results in {out} are complete and mark them as failed; pass --set max_failures="
        f"{failed} if that many are acceptable.",
    )


def _require_counts(batch_size: int, limit: int | None, max_failures: int, thumbnails: int) -> None:
    for flag, value, least in (
        ("batch_size", batch_size, 1),
        ("limit", 1 if limit is None else limit, 1),
        ("max_failures", max_failures, 0),
        ("thumbnails", thumbnails, 0),
    ):
        # lmms-eval reads limit 0 as "all documents" and fractions as a share of the first task.
        if not isinstance(value, int) or value < least:
            raise EvaluationError(
                f"{flag} is {value!r}, a whole number of at least {least} was expected."
            )
