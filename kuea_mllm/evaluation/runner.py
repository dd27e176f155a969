"""Scoring one model directory on tasks of lmms-eval: the `eval` command."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kuea_mllm.adapters.records import read_record
from kuea_mllm.config.evaluate import FewShotSettings
from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.columns import Column, build_column
from kuea_mllm.evaluation.fewshot.completion import Completer
from kuea_mllm.evaluation.fewshot.plan import read_plan
from kuea_mllm.evaluation.fewshot.task_files import FewShotTask, require_inputs, write_fewshot_tasks
from kuea_mllm.evaluation.fewshot.trials import summarise_trials
from kuea_mllm.evaluation.harness import (
    require_one_process,
    run_lmms_eval,
    save_lmms_files,
    stdout_to_stderr,
)
from kuea_mllm.evaluation.loading import load_tasks
from kuea_mllm.evaluation.loguru_bridge import import_lmms_eval, lmms_log
from kuea_mllm.evaluation.opening import choose_adapter, choose_placement, open_session
from kuea_mllm.evaluation.results import KIND, SCHEMA_VERSION, write_rows
from kuea_mllm.evaluation.session import Session
from kuea_mllm.evaluation.tasks import TaskSelection, resolve_tasks
from kuea_mllm.evaluation.thumbnails import thumbnail_writer
from kuea_mllm.io import atomic_directory, require_free_output, write_json
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
) -> dict[str, Any]:
    """Score a model and write a results directory (see `kuea_mllm.evaluation.results`).

    Cheap mistakes are found first: output, arguments, model directory and task files are checked
    and data sets loaded before the weights are.

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

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: If the request cannot be carried out; nothing is written.
        EnvironmentFailure: If more than `max_failures` questions got no answer; the results are
            written all the same.
    """
    model_dir, out = Path(model_dir), Path(out)
    _require_counts(batch_size, limit, max_failures, thumbnails)
    require_one_process()
    require_free_output(out)
    selection = resolve_tasks(tasks) if tasks or fewshot is None else TaskSelection({}, ())
    chosen = choose_adapter(model_dir, adapter)
    placement = choose_placement(device, dtype)
    if fewshot is not None:
        require_inputs(fewshot, data or {})
    started = time.monotonic()
    import_lmms_eval()
    with (
        _written_tasks(fewshot, data or {}, limit) as written,
        atomic_directory(out) as partial,
        lmms_log(partial / "lmms_eval.log"),
    ):
        files = {**selection.files, **{task.name: task.path for task in written}}
        with stdout_to_stderr():
            loaded = load_tasks(TaskSelection(files, selection.stock))
        session = open_session(chosen, model_dir, placement)
        if fewshot is not None:
            session.completer = Completer(session.runtime, fewshot.cache_images)
        session.on_images = thumbnail_writer(partial / "thumbnails", thumbnails)
        session.show_progress = show_progress
        results, tracker = run_lmms_eval(
            session,
            loaded,
            model_dir=model_dir,
            dtype=placement.dtype,
            device=placement.device,
            batch_size=batch_size,
            limit=limit,
            seed=seed,
            folder=partial / "lmms",
        )
        samples = results.pop("samples")
        columns = {
            name: build_column(
                name,
                task,
                results=results,
                samples=samples[name],
                failures=session.failures,
                limit=limit,
            )
            for name, task in loaded.items()
        }
        summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "model": describe_model(model_dir, chosen.name, session.fingerprint),
            "columns": {name: column.entry for name, column in columns.items()},
            "settings": {
                "batch_size": batch_size,
                "limit": limit,
                "limit_rule": LIMIT_RULE,
                "dtype": placement.dtype,
                "device": placement.device,
                "seed": seed,
                "runtime": session.runtime.describe(),
            },
            "versions": {**library_versions(), "datasets": version("datasets")},
            "created": utc_now(),
            "command": command,
            "seconds": round(time.monotonic() - started, 1),
        }
        if fewshot is not None:
            summary["fewshot"] = _describe_fewshot(written, summary["columns"], session, fewshot)
            _keep_plans(written, partial / "fewshot")
        for column in columns.values():
            write_rows(partial / column.entry["samples"], column.rows)
        write_json(partial / "summary.json", summary)
        if recipe is not None:
            (partial / "run.yaml").write_text(recipe, encoding="utf-8")
        save_lmms_files(tracker, results, samples, partial / "lmms")
    LOGGER.info("Results written to %s.", out)
    _require_few_failures(columns, max_failures, out)
    return summary


@contextmanager
def _written_tasks(
    fewshot: FewShotSettings | None, data: Mapping[str, str], limit: int | None
) -> Iterator[list[FewShotTask]]:
    """Write the few-shot tasks for the time of the run; the data stay out of the results."""
    if fewshot is None:
        yield []
        return
    with TemporaryDirectory(prefix="kuea-mllm-fewshot-") as folder:
        yield write_fewshot_tasks(Path(folder), fewshot, data, limit=limit)


def _describe_fewshot(
    tasks: Sequence[FewShotTask],
    columns: Mapping[str, Mapping[str, Any]],
    session: Session,
    settings: FewShotSettings,
) -> dict[str, Any]:
    cache = session.completer.cache if session.completer is not None else None
    return {
        "compat": settings.compat,
        "demonstrations": "random" if settings.retrieval is None else "retrieved",
        "trials": summarise_trials(tasks, columns),
        "images_encoded": cache.encoded if cache is not None else 0,
        "images_reused": cache.reused if cache is not None else 0,
    }


def _keep_plans(tasks: Sequence[FewShotTask], folder: Path) -> None:
    """Keep which demonstrations each document was shown."""
    folder.mkdir()
    for task in tasks:
        plan = read_plan(task.path.with_suffix(".json"))
        shown = {"shots": plan.shots, "seed": task.seed, "demonstrations": plan.demonstrations}
        write_json(folder / f"{task.name}.json", shown)


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


def _require_few_failures(columns: Mapping[str, Column], allowed: int, out: Path) -> None:
    failed = [(name, row) for name, column in columns.items() for row in column.rows if row.failed]
    if len(failed) <= allowed:
        if failed:
            LOGGER.warning("%d questions got no answer (up to %d allowed).", len(failed), allowed)
        return
    name, first = failed[0]
    raise EnvironmentFailure(
        f"{len(failed)} questions got no answer (allowed: {allowed}), the first one is document "
        f"{first.doc_id} of {name}: {first.error or 'no answer'}.",
        f"The results in {out} are complete and mark them as failed; pass --set max_failures="
        f"{len(failed)} if that many are acceptable.",
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
