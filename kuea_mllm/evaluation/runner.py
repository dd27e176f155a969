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
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.answering.answers import require_choices
from kuea_mllm.evaluation.answering.opening import (
    Placement,
    choose_adapter,
    choose_placement,
    open_session,
)
from kuea_mllm.evaluation.answering.processes import (
    AnsweredElsewhereError,
    fail_together,
    join_processes,
    process_number,
)
from kuea_mllm.evaluation.answering.session import Session
from kuea_mllm.evaluation.column_run import (
    RunOptions,
    read_columns,
    require_same_content,
    require_same_questions,
    run_column,
)
from kuea_mllm.evaluation.fewshot.completion import Completer
from kuea_mllm.evaluation.fewshot.room import require_room
from kuea_mllm.evaluation.jobs import (
    Jobs,
    Wishes,
    open_jobs,
    read_wishes,
    warn_of_missing_judge,
)
from kuea_mllm.evaluation.judging.client import require_plain_url
from kuea_mllm.evaluation.judging.column import require_judge
from kuea_mllm.evaluation.judging.finished import judge_finished_columns
from kuea_mllm.evaluation.lmms.backend_session import BackendSession, open_backend
from kuea_mllm.evaluation.lmms.backends import Backend, require_backend, require_plain_tasks
from kuea_mllm.evaluation.lmms.loguru_bridge import import_lmms_eval, lmms_log
from kuea_mllm.evaluation.plugin import MODEL_ID
from kuea_mllm.evaluation.request import Request
from kuea_mllm.evaluation.suites.remarks import foreign_boxes
from kuea_mllm.evaluation.summary import make_summary, require_few_failures, write_results
from kuea_mllm.evaluation.unfinished import (
    Identity,
    Unfinished,
    fingerprint_files,
    open_unfinished,
    require_startable,
)
from kuea_mllm.io import atomic_directory
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import library_versions

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
    same_as: Path | None = None,
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
        backend: Model class of lmms-eval that answers, ours or another (see `lmms.backends`).
        backend_args: Arguments of another backend.
        shared_prefix: Compute what questions about one image share only once.
        resume: Go on with the unfinished evaluation of `out`, which must be of the same recipe,
            model and library versions.
        restart: Drop the unfinished evaluation of `out`, if there is one.
        same_as: Results of another model, which has to have been asked the same questions about the
            same data.

    Returns:
        The content of `summary.json`; of several processes only the first has it.

    Raises:
        UserError: If the request cannot be carried out; `out` is not written.
        EnvironmentFailure: If more than `max_failures` questions got no answer; the results are
            written all the same.
    """
    request = Request(
        model_dir=Path(model_dir),
        tasks=tasks,
        out=Path(out),
        adapter=adapter,
        batch_size=batch_size,
        limit=limit,
        limit_seed=limit_seed,
        dtype=dtype,
        device=device,
        seed=seed,
        max_failures=max_failures,
        thumbnails=thumbnails,
        command=command,
        show_progress=show_progress,
        recipe=recipe,
        suite=suite,
        fewshot=fewshot,
        data=data or {},
        data_root=data_root,
        judge=judge,
        backend=backend,
        backend_args=backend_args or {},
        shared_prefix=shared_prefix,
        resume=resume,
        restart=restart,
        same_as=same_as,
    )
    join_processes(device or "auto")
    with fail_together():
        checked = _check(request)
    return _run(request, *checked)


def _check(request: Request) -> tuple[Wishes, MLLMAdapter | Backend, Placement]:
    """Find the mistakes that can be found without opening a data set or a model."""
    request.require_counts()
    if process_number() == 0:
        require_startable(request.out, resume=request.resume, restart=request.restart)
    wishes = read_wishes(
        request.tasks,
        suite=request.suite,
        fewshot=request.fewshot,
        data=request.data,
        data_root=request.data_root,
        limit=request.limit,
        limit_seed=request.limit_seed,
    )
    subject = _choose_subject(request)
    placement = choose_placement(request.device, request.dtype)
    if request.judge is not None:
        require_plain_url(request.judge.url)
    is_judged = warn_of_missing_judge(wishes, request.judge)
    if is_judged and request.judge is not None and process_number() == 0:
        require_judge(request.judge)
    return wishes, subject, placement


def _run(
    request: Request, wishes: Wishes, subject: MLLMAdapter | Backend, placement: Placement
) -> dict[str, Any]:
    """Ask, score and write what is missing of an evaluation that was found possible."""
    versions = {**library_versions(), "datasets": version("datasets")}
    adapter = None if isinstance(subject, Backend) else subject.name
    identity = Identity(request.identity(wishes, adapter, placement), versions)
    started = time.monotonic()
    import_lmms_eval()
    ways = {"resume": request.resume, "restart": request.restart}
    with (
        open_unfinished(request.out, identity, **ways) as kept,
        lmms_log(kept.log),
        ExitStack() as opened,
    ):
        with fail_together():
            jobs = opened.enter_context(open_jobs(wishes, placement.device))
            if isinstance(subject, Backend):
                require_plain_tasks(jobs.all, subject)
            files = _fingerprint(request.model_dir)
            kept.claim(files or str(request.model_dir))
            require_same_content(kept, jobs.all)
            if request.same_as is not None and process_number() == 0:
                require_same_questions(request.same_as, jobs.all)
            session = _open(request, subject, placement)
            if isinstance(session, Session):
                _prepare_session(session, jobs, kept, wishes)
        _run_jobs(jobs, session, _options(request, placement), kept)
        if isinstance(session, BackendSession):
            session.close()
        if process_number():
            return {}
        names = list(jobs.all)
        judge_finished_columns(kept, names, request.judge, show_progress=request.show_progress)
        columns = read_columns(kept, names)
        summary = make_summary(
            request,
            subject=subject,
            session=session,
            placement=placement,
            files=files,
            jobs=jobs,
            columns=columns,
            versions=versions,
            seconds=time.monotonic() - started,
        )
        write_results(request.out, kept, summary, request.recipe)
    require_few_failures(columns, request.max_failures, request.out)
    return summary


def _open(
    request: Request, subject: MLLMAdapter | Backend, placement: Placement
) -> Session | BackendSession:
    if isinstance(subject, Backend):
        device = None if request.device in (None, "auto") else request.device
        return open_backend(
            subject, request.model_dir, batch_size=request.batch_size, device=device
        )
    session = open_session(subject, request.model_dir, placement)
    session.show_progress = request.show_progress
    session.shared_prefix = request.shared_prefix
    return session


def _options(request: Request, placement: Placement) -> RunOptions:
    return RunOptions(
        model_dir=request.model_dir,
        placement=placement,
        batch_size=request.batch_size,
        limit=request.limit,
        seed=request.seed,
        thumbnails=request.thumbnails,
    )


def _fingerprint(model_dir: Path) -> str | None:
    """Hash the files of a model; None where it is a name only, or another process does it."""
    # Reads all weights.
    return fingerprint_files(model_dir) if model_dir.is_dir() and not process_number() else None


def _choose_subject(request: Request) -> MLLMAdapter | Backend:
    """Find what opens the model: an adapter, or a model class of lmms-eval."""
    if request.backend == MODEL_ID:
        return choose_adapter(request.model_dir, request.adapter)
    if request.fewshot is not None:
        raise EvaluationError(
            f"few-shot tasks cannot be answered by backend {request.backend}: they need a model "
            "that an adapter opens.",
            "Leave out --backend.",
        )
    return require_backend(request.backend, request.backend_args)


def _prepare_session(session: Session, jobs: Jobs, kept: Unfinished, wishes: Wishes) -> None:
    """Give a session what few-shot tasks need, and see that the model can answer all tasks."""
    # Hours before the column's turn comes.
    candidates = {name: job.generation.get("candidates") for name, job in jobs.all.items()}
    require_choices(session, {tuple(given): name for name, given in candidates.items() if given})
    if remark := foreign_boxes(wishes.planned, session.runtime.describe()):
        LOGGER.warning("%s", remark)
    if wishes.fewshot is not None:
        session.completer = Completer(session.runtime, wishes.fewshot.cache_images)
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
            session.journal, session.shown = kept.journal(name, job.content), options.thumbnails
        with _column_folder(kept, name) as folder, suppress(AnsweredElsewhereError):
            run_column(job, session, own, folder)


@contextmanager
def _column_folder(kept: Unfinished, name: str) -> Iterator[Path]:
    """Give the folder of a column; in processes that only answer, one that is thrown away."""
    if process_number():
        with TemporaryDirectory(prefix="kuea-mllm-share-") as folder:
            yield Path(folder)
        return
    with atomic_directory(kept.column(name)) as folder:
        yield folder
