"""The tasks of one evaluation: those that were named, the columns of a suite, few-shot ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kuea_mllm.config.evaluate import FLAMINGO_SUITE, FewShotSettings, SuiteSettings
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.content import hash_documents
from kuea_mllm.evaluation.fewshot.task_files import FewShotTask, require_inputs, write_fewshot_tasks
from kuea_mllm.evaluation.judging.prompts import STOCK_TASKS
from kuea_mllm.evaluation.lmms.harness import stdout_to_stderr
from kuea_mllm.evaluation.lmms.loading import describe_data, load_tasks
from kuea_mllm.evaluation.suites.registry import (
    DataFolders,
    PlannedColumn,
    plan_columns,
    require_data,
)
from kuea_mllm.evaluation.suites.subset import limit_task
from kuea_mllm.evaluation.suites.task_files import SuiteTask, write_suite_tasks
from kuea_mllm.evaluation.task_yaml import WrittenTask
from kuea_mllm.evaluation.tasks import TaskSelection, resolve_tasks
from kuea_mllm.log import LOGGER

if TYPE_CHECKING:
    from kuea_mllm.config.evaluate import JudgeSettings

NO_TASKS = TaskSelection({}, ())


@dataclass(frozen=True)
class Wishes:
    """What is to be asked, as it was requested.

    Attributes:
        selection: Tasks that were named.
        suite: Columns of the paper.
        fewshot: Few-shot tasks.
        folders: Where data sets lie.
        limit: Documents per task.
        limit_seed: Draw them at random with this seed; None takes the first.
    """

    selection: TaskSelection
    suite: SuiteSettings | None
    fewshot: FewShotSettings | None
    folders: DataFolders
    limit: int | None
    limit_seed: int | None

    @property
    def planned(self) -> list[PlannedColumn]:
        """Columns of the suite; the few-shot suite has none, its tasks come from `fewshot`."""
        if self.suite is None or self.suite.name == FLAMINGO_SUITE:
            return []
        return plan_columns(self.suite, self.folders)

    @property
    def fewshot_data(self) -> dict[str, str]:
        """Folder of each few-shot data set that was given."""
        names = [] if self.fewshot is None else self.fewshot.datasets
        found = {name: self.folders.find(name) for name in names}
        return {name: str(folder) for name, folder in found.items() if folder is not None}

    def describe_tasks(self) -> dict[str, str]:
        """Return the named tasks with a hash of each file: a resumed evaluation compares them."""
        files = {name: _hash_task(path) for name, path in self.selection.files.items()}
        return {**files, **dict.fromkeys(self.selection.stock, "of lmms-eval")}


@dataclass(frozen=True)
class Job:
    """One task that is run.

    Attributes:
        name: Its name.
        load: Gives lmms-eval's object for it, once.
        written: What was written for it, if we wrote it.
        generation: How it is to be answered.
        limit: Documents that lmms-eval uses; None where the task is cut down already.
        data: Its data set, in words.
        content: Hash of what it asks; a resumed evaluation knows it by that. None if unknown.
    """

    name: str
    load: Callable[[], Any]
    written: WrittenTask | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    data: str = ""
    content: str | None = None

    def get_config(self, key: str) -> Any:
        """Say what lmms-eval's object would say about its generation, without loading it."""
        return self.generation if key == "generation_kwargs" else None


@dataclass(frozen=True)
class Jobs:
    """All that is run, in its order."""

    all: Mapping[str, Job]
    fewshot: Sequence[FewShotTask] = field(default=())


def read_wishes(
    tasks: Sequence[str],
    *,
    suite: SuiteSettings | None,
    fewshot: FewShotSettings | None,
    data: Mapping[str, str] | None,
    data_root: str | None,
    limit: int | None,
    limit_seed: int | None,
) -> Wishes:
    """Sort out what is asked for, and look for what can be missed without opening a data set.

    Raises:
        UserError: If a task, folder or tool is missing.
    """
    is_alone = suite is None and fewshot is None
    selection = resolve_tasks(tasks) if tasks or is_alone else NO_TASKS
    folders = DataFolders(data_root, dict(data or {}))
    wishes = Wishes(selection, suite, fewshot, folders, limit, limit_seed)
    require_data(wishes.planned)
    if fewshot is not None:
        require_inputs(fewshot, wishes.fewshot_data)
    return wishes


@contextmanager
def open_jobs(wishes: Wishes, device: str) -> Iterator[Jobs]:
    """Load or write all tasks, for the time of the run: data sets stay out of the results.

    Args:
        wishes: What is to be asked.
        device: Where images are embedded for the retrieval of demonstrations.

    Raises:
        UserError: If a data set cannot be read.
    """
    with TemporaryDirectory(prefix="kuea-mllm-tasks-") as folder:
        limits: dict[str, Any] = {"limit": wishes.limit, "limit_seed": wishes.limit_seed}
        named = _load_named(wishes)
        planned, columns = wishes.planned, list[SuiteTask]()
        if wishes.suite is not None and planned:
            columns = write_suite_tasks(Path(folder), wishes.suite, planned, **limits)
        fewshot: list[FewShotTask] = []
        if wishes.fewshot is not None:
            fewshot = write_fewshot_tasks(
                Path(folder), wishes.fewshot, wishes.fewshot_data, **limits, device=device
            )
        jobs = [*named, *(_column_job(task, wishes) for task in columns)]
        jobs += [_written_job(task, task.generation) for task in fewshot]
        yield Jobs(_by_name(jobs), fewshot)


def warn_of_missing_judge(wishes: Wishes, judge: JudgeSettings | None) -> bool:
    """Say at once which columns will have no score; return whether any is judged."""
    judged = [column.column for column in wishes.planned if column.source.judged]
    judged += [name for name in wishes.selection.stock if name in STOCK_TASKS]
    if judged and judge is None:
        LOGGER.warning(
            "%s: answers are graded by a language model, and no judge was given (--judge-url, "
            "--judge-model). The answers are kept and the columns marked as missing.",
            ", ".join(judged),
        )
    return bool(judged)


def _load_named(wishes: Wishes) -> list[Job]:
    """Load the tasks that were asked for by name, before a model is opened."""
    selection = wishes.selection
    if not selection.files and not selection.stock:
        return []
    with stdout_to_stderr():
        loaded = load_tasks(selection)
    is_drawn = wishes.limit_seed is not None
    if is_drawn:
        for task in loaded.values():
            limit_task(task, wishes.limit, wishes.limit_seed)
    limit = None if is_drawn else wishes.limit
    # `pop`, because a task object holds all its requests and answers once it has run.
    return [
        Job(
            name,
            partial(loaded.pop, name),
            None,
            _generation(task),
            limit,
            data=describe_data(vars(task.config)),
            content=hash_documents(task, limit),
        )
        for name, task in loaded.items()
    ]


def _column_job(task: SuiteTask, wishes: Wishes) -> Job:
    """Prepare a column: what lmms-eval reads is loaded now, what we wrote is known to load."""
    if not task.is_stock:
        return _written_job(task, task.generation)
    loaded = [_load(task)]
    limit_task(loaded[0], wishes.limit, wishes.limit_seed, per_unit=task.per_unit)
    return Job(
        task.name,
        loaded.pop,
        task,
        _generation(loaded[0]),
        data=f"data set {task.dataset} ({loaded[0].config.dataset_path})",
        # The task file says how they are asked, the rows that lmms-eval reads what is asked.
        content=f"{task.content} {hash_documents(loaded[0])}",
    )


def _written_job(task: WrittenTask, generation: Mapping[str, Any]) -> Job:
    return Job(
        task.name,
        partial(_load, task),
        task,
        generation,
        data=f"data set {task.dataset}",
        content=task.content,
    )


def _generation(task: Any) -> dict[str, Any]:
    return dict(task.get_config("generation_kwargs") or {})


def _load(task: WrittenTask) -> Any:
    with stdout_to_stderr():
        return load_tasks(TaskSelection({task.name: task.path}, ()))[task.name]


def _by_name(jobs: Sequence[Job]) -> dict[str, Job]:
    found: dict[str, Job] = {}
    for job in jobs:
        if job.name in found:
            raise EvaluationError(
                f"task name {job.name!r} has two sources: --tasks and the suite.",
                "Rename the task, or leave one of the two out.",
            )
        found[job.name] = job
    return found


def _hash_task(path: Path) -> str:
    """Hash a task file and the code beside it, where its functions are."""
    digest = hashlib.sha256()
    for file in (path, *sorted(path.parent.glob("*.py"))):
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
