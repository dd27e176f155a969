"""Scoring one model directory on tasks of lmms-eval: the `eval` command."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kuea_mllm.config.evaluate import FewShotSettings, JudgeSettings, SuiteSettings
from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.answers import require_choices
from kuea_mllm.evaluation.backends import (
    Backend,
    BackendSession,
    open_backend,
    require_backend,
    require_plain_tasks,
)
from kuea_mllm.evaluation.column_run import (
    RunOptions,
    gather_columns,
    read_columns,
    require_same_content,
    run_column,
)
from kuea_mllm.evaluation.fewshot.completion import Completer
from kuea_mllm.evaluation.fewshot.room import require_room
from kuea_mllm.evaluation.jobs import Jobs, open_jobs, read_wishes, warn_of_missing_judge
from kuea_mllm.evaluation.judging.client import require_plain_url
from kuea_mllm.evaluation.judging.column import describe_judge, require_judge
from kuea_mllm.evaluation.judging.finished import judge_finished_columns
from kuea_mllm.evaluation.loguru_bridge import import_lmms_eval, lmms_log
from kuea_mllm.evaluation.opening import choose_adapter, choose_placement, open_session
from kuea_mllm.evaluation.plugin import MODEL_ID
from kuea_mllm.evaluation.processes import (
    AnsweredElsewhereError,
    fail_together,
    join_processes,
    process_count,
    process_number,
)
from kuea_mllm.evaluation.provenance import (
    describe_fewshot,
    describe_making,
    describe_runtime,
    describe_subject,
)
from kuea_mllm.evaluation.results import KIND, SCHEMA_VERSION
from kuea_mllm.evaluation.session import Session
from kuea_mllm.evaluation.suites.subset import limit_rule
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

if TYPE_CHECKING:
    from kuea_mllm.adapters.base import MLLMAdapter


def evaluate(
    model_dir: Path,
    tasks: Sequence[str],
    out: Path,
    *,
    adapter: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    limit_seed: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    max_failures: int = 0,
    thumbnails: int = 500,
    command: str | None = None,
    show_progress: bool = True,
    recipe: str | None = None,
    suite: SuiteSettings | None = None,
    fewshot: FewShotSettings | None = None,
    data: Mapping[str, str] | None = None,
    data_root: str | None = None,
    judge: JudgeSettings | None = None,
    backend: str = MODEL_ID,
    backend_args: Mapping[str, str] | None = None,
    shared_prefix: bool = True,
    resume: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Score a model and write a results directory (see `kuea_mllm.evaluation.results`).

    Cheap mistakes are found first: output, arguments, model directory, task files and data sets
    are checked, their images looked for and the judge asked, before the weights are loaded. Tasks
    are then run one after the other; what ends the evaluation early leaves those that are finished
    in `OUT.unfinished`. Of several processes (torchrun's, or those of `--num-processes`) each calls
    this and answers its share; the first one scores, judges and writes.

    Args:
        model_dir: MLLM directory that an adapter can open, or what another backend calls a model.
        tasks: Names of lmms-eval tasks, task YAML files, or directories of them.
        out: Directory to create.
        adapter: Adapter to use; None finds the one that recognises the model.
        batch_size: Questions per forward pass.
        limit: Use N documents of each task.
        limit_seed: Draw them at random with this seed; None takes the first.
        dtype: "auto" (bfloat16 on CUDA, float32 elsewhere) or a number format.
        device: None or "auto" for the first GPU or else the CPU; otherwise exactly this one.
        seed: Seed of sampling and of few-shot choices.
        max_failures: Unanswered questions that are put up with.
        thumbnails: Documents per task whose image is kept for reports.
        command: The command line, for the record.
        show_progress: Whether a progress bar is drawn.
        recipe: The resolved recipe, kept as `run.yaml`.
        suite: Columns of the paper to run beside `tasks`, which may then be empty.
        fewshot: Few-shot tasks to run beside `tasks`, which may then be empty.
        data: Folder of each data set.
        data_root: Folder with a sub-folder for each data set that `data` does not name.
        judge: Who grades the answers of judged columns; None leaves them without a score.
        backend: Model class of lmms-eval that answers, ours or another (see `backends`).
        backend_args: Arguments of another backend.
        shared_prefix: Compute what questions about one image share only once.
        resume: Go on with the unfinished evaluation of `out`, which must be of the same recipe,
            model and library versions.
        restart: Drop the unfinished evaluation of `out`, if there is one.

    Returns:
        The content of `summary.json`; of several processes only the first has it.

    Raises:
        UserError: If the request cannot be carried out; `out` is not written.
        EnvironmentFailure: If more than `max_failures` questions got no answer; the results are
            written all the same.
    """
    model_dir, out = Path(model_dir), Path(out)
    join_processes(device or "auto")
    with fail_together():
        _require_counts(batch_size, limit, max_failures, thumbnails)
        if process_number() == 0:
            require_startable(out, resume=resume, restart=restart)
        wishes = read_wishes(
            tasks,
            suite=suite,
            fewshot=fewshot,
            data=data,
            data_root=data_root,
            limit=limit,
            limit_seed=limit_seed,
        )
        subject = _choose_subject(model_dir, adapter, backend, backend_args or {}, fewshot)
        placement = choose_placement(device, dtype)
        if judge is not None:
            require_plain_url(judge.url)
        if warn_of_missing_judge(wishes, judge) and judge is not None and process_number() == 0:
            require_judge(judge)
    versions = {**library_versions(), "datasets": version("datasets")}
    settings = {
        "adapter": None if isinstance(subject, Backend) else subject.name,
        "backend": backend,
        "backend_args": dict(backend_args or {}),
        "tasks": wishes.describe_tasks(),
        "batch_size": batch_size,
        "limit": limit,
        "limit_seed": limit_seed,
        "dtype": placement.dtype,
        "device": placement.device,
        "seed": seed,
        "max_failures": max_failures,
        "thumbnails": thumbnails,
        "suite": None if suite is None else suite.model_dump(mode="json"),
        "fewshot": None if fewshot is None else fewshot.model_dump(mode="json"),
        "data": dict(data or {}),
        "data_root": data_root,
        "judge": None if judge is None else judge.model_dump(mode="json"),
        "shared_prefix": shared_prefix,
    }
    started = time.monotonic()
    import_lmms_eval()
    identity = Identity(settings, versions)
    with (
        open_unfinished(out, identity, resume=resume, restart=restart) as kept,
        lmms_log(kept.log),
        ExitStack() as opened,
    ):
        with fail_together():
            jobs = opened.enter_context(open_jobs(wishes, placement.device))
            if isinstance(subject, Backend):
                require_plain_tasks(jobs.all, subject)
            files = _fingerprint(model_dir)
            kept.claim(files or str(model_dir))
            require_same_content(kept, jobs.written)
            if isinstance(subject, Backend):
                chosen_device = None if device in (None, "auto") else device
                session: Session | BackendSession = open_backend(
                    subject, model_dir, batch_size=batch_size, device=chosen_device
                )
            else:
                session = open_session(subject, model_dir, placement)
                _prepare_session(session, jobs, kept, fewshot)
                session.show_progress, session.shared_prefix = show_progress, shared_prefix
        options = RunOptions(model_dir, placement, batch_size, limit, seed, thumbnails)
        _run_jobs(jobs, session, options, kept)
        if isinstance(session, BackendSession):
            session.close()
        if process_number():
            return {}
        judge_finished_columns(kept, list(jobs.all), judge, show_progress=show_progress)
        columns = read_columns(kept, list(jobs.all))
        summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "model": describe_subject(model_dir, subject, session),
            "model_record": describe_making(model_dir),
            "columns": {name: column["entry"] for name, column in columns.items()},
            "settings": {
                "batch_size": batch_size,
                "limit": limit,
                "limit_seed": limit_seed,
                "limit_rule": limit_rule(limit_seed),
                "suite": None if suite is None else suite.name,
                "protocol": None if suite is None else suite.protocol,
                "judge": None if judge is None else describe_judge(judge),
                "backend": backend,
                "dtype": placement.dtype,
                "device": placement.device,
                "seed": seed,
                "max_failures": max_failures,
                "processes": process_count(),
                "shared_prefix": shared_prefix,
                "runtime": describe_runtime(session),
            },
            "versions": versions,
            "created": utc_now(),
            "command": command,
            "seconds": round(time.monotonic() - started, 1),
        }
        summary["model"]["files_fingerprint"] = files
        if isinstance(subject, Backend):
            # Its class decides on the number format, and on the device unless one was named.
            summary["settings"] |= {"dtype": None, "device": device}
        if fewshot is not None:
            summary["fewshot"] = describe_fewshot(jobs.fewshot, columns, fewshot)
        _write_results(out, kept, summary, recipe)
    _require_few_failures(columns, max_failures, out)
    return summary


def _write_results(
    out: Path, kept: Unfinished, summary: Mapping[str, Any], recipe: str | None
) -> None:
    with atomic_directory(out) as folder:
        gather_columns(kept, list(summary["columns"]), folder)
        write_json(folder / "summary.json", summary)
        if recipe is not None:
            (folder / "run.yaml").write_text(recipe, encoding="utf-8")
        (folder / LOG).write_bytes(kept.log.read_bytes())
    LOGGER.info("Results written to %s.", out)


def _fingerprint(model_dir: Path) -> str | None:
    """Hash the files of a model; None where it is a name only, or another process does it."""
    # Reads all weights.
    return fingerprint_files(model_dir) if model_dir.is_dir() and not process_number() else None


def _choose_subject(
    model_dir: Path,
    adapter: str | None,
    backend: str,
    arguments: Mapping[str, str],
    fewshot: FewShotSettings | None,
) -> MLLMAdapter | Backend:
    """Find what opens the model: an adapter, or a model class of lmms-eval."""
    if backend == MODEL_ID:
        return choose_adapter(model_dir, adapter)
    if fewshot is not None:
        raise EvaluationError(
            f"few-shot tasks cannot be answered by backend {backend}: they need a model that an "
            "adapter opens.",
            "Leave out --backend.",
        )
    return require_backend(backend, arguments)


def _prepare_session(
    session: Session, jobs: Jobs, kept: Unfinished, fewshot: FewShotSettings | None
) -> None:
    """Give a session what few-shot tasks need, and see that the model can answer all tasks."""
    # Hours before the column's turn comes.
    candidates = {name: job.generation.get("candidates") for name, job in jobs.all.items()}
    require_choices(session, {tuple(given): name for name, given in candidates.items() if given})
    if fewshot is not None:
        session.completer = Completer(session.runtime, fewshot.cache_images)
        require_room(session.completer, [t for t in jobs.fewshot if not kept.is_finished(t.name)])


def _run_jobs(
    jobs: Jobs, session: Session | BackendSession, options: RunOptions, kept: Unfinished
) -> None:
    for number, (name, job) in enumerate(jobs.all.items(), start=1):
        if kept.is_finished(name):
            LOGGER.info("Column %d of %d, %s: finished before.", number, len(jobs.all), name)
            continue
        LOGGER.info("Column %d of %d: %s.", number, len(jobs.all), name)
        own = replace(options, limit=job.limit)
        if isinstance(session, Session):
            content = None if job.written is None else job.written.content
            session.journal, session.shown = kept.journal(name, content), options.thumbnails
        with _column_folder(kept, name) as folder, suppress(AnsweredElsewhereError):
            run_column(name, job.load(), session, own, folder, written=job.written)


@contextmanager
def _column_folder(kept: Unfinished, name: str) -> Iterator[Path]:
    """Give the folder of a column; in processes that only answer, one that is thrown away."""
    if process_number():
        with TemporaryDirectory(prefix="kuea-mllm-share-") as folder:
            yield Path(folder)
        return
    with atomic_directory(kept.column(name)) as folder:
        yield folder


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
