"""One column of an evaluation, from the questions to a directory, and all of them put together.

A column's directory is laid out like the results directory that it becomes a part of (see
`results`), with `column.json` beside it. Nothing of a column stays in memory when it is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.answering.opening import Placement
from kuea_mllm.evaluation.answering.session import Session
from kuea_mllm.evaluation.columns import build_column
from kuea_mllm.evaluation.fewshot.plan import read_plan, write_shown
from kuea_mllm.evaluation.fewshot.task_files import FewShotTask
from kuea_mllm.evaluation.jobs import Job
from kuea_mllm.evaluation.judging.column import write_documents
from kuea_mllm.evaluation.judging.finished import documents_path
from kuea_mllm.evaluation.judging.task import judged_documents, take_over_scoring
from kuea_mllm.evaluation.lmms.backend_session import BackendSession
from kuea_mllm.evaluation.lmms.harness import run_lmms_eval, save_lmms_files
from kuea_mllm.evaluation.provenance import describe_runtime
from kuea_mllm.evaluation.results import load_results, write_rows
from kuea_mllm.evaluation.suites.remarks import remarks_on
from kuea_mllm.evaluation.thumbnails import thumbnail_writer
from kuea_mllm.evaluation.unfinished import COLUMN, Unfinished
from kuea_mllm.io import read_json, write_json

_RESULTS = "_results.json"


@dataclass(frozen=True)
class RunOptions:
    """What all columns share.

    Attributes:
        model_dir: The model.
        placement: Where it runs.
        batch_size: Questions per forward pass.
        limit: Documents per task.
        seed: Seed of sampling.
        thumbnails: Documents per task whose image is kept.
    """

    model_dir: Path
    placement: Placement
    batch_size: int
    limit: int | None
    seed: int
    thumbnails: int


def run_column(
    job: Job, session: Session | BackendSession, options: RunOptions, folder: Path
) -> None:
    """Ask the questions of one task and write its column.

    A column that a judge scores is written without a score, with what the judge has to know (see
    `judging.finished`).

    Args:
        job: The task.
        session: The open model, ours or a backend's; its failures become those of this task.
        options: What all columns share.
        folder: Empty directory of the column.

    Raises:
        UserError: If the task cannot be scored.
        EnvironmentFailure: If its first questions all fail, or lmms-eval loses documents.
    """
    name, task = job.name, job.load()
    session.failures = []
    session.on_images = thumbnail_writer(folder / "thumbnails", options.thumbnails)
    if isinstance(session, BackendSession):
        session.shown = options.thumbnails
    before = _image_counts(session)
    is_judged = take_over_scoring(name, task)
    run = session.run if isinstance(session, BackendSession) else partial(run_lmms_eval, session)
    results, tracker = run(
        {name: task},
        model_dir=options.model_dir,
        dtype=options.placement.dtype,
        device=options.placement.device,
        batch_size=options.batch_size,
        limit=options.limit,
        seed=options.seed,
        folder=folder / "lmms",
    )
    samples = results.pop("samples")
    column = build_column(
        name,
        task,
        results=results,
        samples=samples[name],
        failures=session.failures,
        limit=options.limit,
    )
    column.entry["remarks"] = remarks_on(column.entry, column.rows, describe_runtime(session))
    column.entry["content"] = job.content
    write_rows(folder / column.entry["samples"], column.rows)
    if is_judged:
        documents = judged_documents(name, task, samples[name])
        write_documents(documents_path(folder, name), documents)
    if isinstance(job.written, FewShotTask):
        plan = read_plan(job.written.path.with_suffix(".json"))
        write_shown(folder / "fewshot" / f"{name}.json", plan, job.written.seed)
    save_lmms_files(tracker, results, samples, folder / "lmms")
    failed = next((row for row in column.rows if row.failed), None)
    encoded, reused = (now - then for now, then in zip(_image_counts(session), before, strict=True))
    write_json(
        folder / COLUMN,
        {
            "entry": column.entry,
            "first_failure": None if failed is None else [failed.doc_id, failed.error],
            "content": job.content,
            "images_encoded": encoded,
            "images_reused": reused,
        },
    )


def read_columns(unfinished: Unfinished, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the records of finished columns, those that are there, in the order of `names`."""
    return {
        name: read_json(unfinished.column(name) / COLUMN)
        for name in names
        if unfinished.is_finished(name)
    }


def require_same_content(unfinished: Unfinished, jobs: Mapping[str, Job]) -> None:
    """Make sure that finished columns asked what would be asked now.

    Raises:
        EvaluationError: Naming the data set that has changed.
    """
    for name, column in read_columns(unfinished, list(jobs)).items():
        if column["content"] != jobs[name].content:
            raise EvaluationError(
                f"--resume: the questions, demonstrations or images of {name} are not those of "
                f"the finished column: the files of {jobs[name].data} have changed.",
                "Restore them, or drop the unfinished evaluation with --restart.",
            )


def require_same_questions(results: Path, jobs: Mapping[str, Job]) -> None:
    """Make sure that another model was asked what would be asked now.

    Args:
        results: Its results directory.
        jobs: The tasks.

    Raises:
        EvaluationError: Naming the data set that has changed.
    """
    for name, entry in load_results(results).columns.items():
        # Older results do not say.
        if name in jobs and entry.get("content") not in (None, jobs[name].content):
            raise EvaluationError(
                f"the questions, demonstrations or images of {name} are not those that {results} "
                f"holds answers to: the files of {jobs[name].data} have changed since.",
                "Restore them, or evaluate both models anew with --restart.",
            )


def gather_columns(unfinished: Unfinished, names: Sequence[str], out: Path) -> None:
    """Put the files of all columns into one results directory, without copying where possible."""
    for name in names:
        shutil.copytree(
            unfinished.column(name),
            out,
            copy_function=_link,
            ignore=lambda _, files: {f for f in files if f == COLUMN or f.endswith(_RESULTS)},
            dirs_exist_ok=True,
        )
    found = [_lmms_results(unfinished.column(name)) for name in names]
    # As one run of lmms-eval would have named it.
    path = out / found[0].relative_to(unfinished.column(names[0]))
    contents = {name: read_json(file) for name, file in zip(names, found, strict=True)}
    path.write_text(json.dumps(_merged(contents), indent=2), encoding="utf-8")


def _lmms_results(column: Path) -> Path:
    return next(iter((column / "lmms").rglob(f"*{_RESULTS}")))


def _merged(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put lmms-eval's results of single tasks into one, what differs between them under `runs`."""
    merged: dict[str, Any] = {}
    runs: dict[str, dict[str, Any]] = {name: {} for name in contents}
    for key in dict.fromkeys(key for content in contents.values() for key in content):
        values = {name: content[key] for name, content in contents.items() if key in content}
        parts = [value for value in values.values() if isinstance(value, dict)]
        if len(parts) == len(values) and all(set(part) <= set(contents) for part in parts):
            merged[key] = {task: value for part in parts for task, value in part.items()}
            continue
        first = next(iter(values.values()))
        if len(values) == len(contents) and all(value == first for value in values.values()):
            merged[key] = first
        else:
            for name, value in values.items():
                runs[name][key] = value
    return merged | ({"runs": runs} if any(runs.values()) else {})


def _image_counts(session: Session | BackendSession) -> tuple[int, int]:
    if isinstance(session, BackendSession) or session.completer is None:
        return 0, 0
    return session.completer.cache.encoded, session.completer.cache.reused


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    # Another file system, or one without links.
    except OSError:
        shutil.copy2(source, target)
