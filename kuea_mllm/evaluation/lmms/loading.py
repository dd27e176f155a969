"""Loading lmms-eval's task objects and their data, with errors that name task and data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.answering.generation import one_line
from kuea_mllm.evaluation.plugin import MODEL_ID
from kuea_mllm.evaluation.tasks import TaskSelection, nearest_names

BENCHMARK_METRICS = (
    "refcoco_ACC@0.5",
    "mmvp_pair_accuracy",
    "pope_accuracy",
    "gpt_eval_llava_all",
    "coco_CIDEr",
    "flickr_CIDEr",
    "nocaps_CIDEr",
    "textcaps_CIDEr",
    "seed_all",
)
"""Scores of stock tasks that list another metric first."""


def load_tasks(selection: TaskSelection) -> dict[str, Any]:
    """Load the tasks and their data sets, before any model is opened.

    Returns:
        Task objects of lmms-eval by name, own files first; groups are replaced by their members.

    Raises:
        EvaluationError: If a name is unknown, a file or data set cannot be loaded, or a task is
            of a kind that cannot be scored.
    """
    tasks: dict[str, Any] = {}
    for name, path in selection.files.items():
        tasks[name] = _load_file(name, path)
    if selection.stock:
        _load_stock(selection.stock, tasks)
    for name, task in tasks.items():
        require_scorable(name, task)
    return tasks


def document_count(task: Any, limit: int | None) -> int:
    """Return how many documents a run uses: the first `limit`, or all."""
    available = len(task.eval_docs_no_media)
    return available if limit is None else min(limit, available)


def main_metric(task: Any) -> str | None:
    """Return the metric that stands for the task.

    It is the one that the benchmark is known by, where that is not the first; else the first one
    that is a score.
    """
    names = [str(name) for name in task.aggregation() if name != "submission"]
    return next((name for name in (*BENCHMARK_METRICS, *names) if name in names), None)


def require_scorable(name: str, task: Any) -> None:
    """Refuse tasks that lmms-eval 0.7.3 or our model class cannot score.

    Raises:
        EvaluationError: Naming the task and what it asks for.
    """
    output_type = task.get_config("output_type")
    if output_type != "generate_until":
        raise EvaluationError(
            f"task {name} has `output_type: {output_type}`, which lmms-eval 0.7.3 cannot score "
            "with this model class.",
            "Use a task with `output_type: generate_until`.",
        )
    if main_metric(task) is None:
        raise EvaluationError(
            f"task {name} has no score: its answers are only written for submission.",
            "Use the split of that benchmark whose answers are public.",
        )


def _load_file(name: str, path: Path) -> Any:
    # The metric registry fills itself on this import; without it every metric name is unknown.
    import lmms_eval.api.metrics  # noqa: F401
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.utils import load_yaml_config

    source = f"task {name} ({path})"
    try:
        config = load_yaml_config(str(path.resolve()), mode="full")
    # The file's own functions are imported here: anything can go wrong in them.
    except Exception as error:
        raise EvaluationError(f"{source} cannot be read: {one_line(error)}") from error
    load = partial(ConfigurableTask, config=config, model_name=MODEL_ID)
    return _guarded(source, describe_data(config), load)


def describe_data(config: Mapping[str, Any]) -> str:
    """Name the data set of a task's configuration."""
    arguments = config.get("dataset_kwargs")
    files = arguments.get("data_files") if isinstance(arguments, dict) else None
    parts = (config.get("dataset_path"), config.get("dataset_name"), files)
    return "data set " + " ".join(str(part) for part in parts if part)


def _load_stock(names: tuple[str, ...], tasks: dict[str, Any]) -> None:
    import lmms_eval.api.metrics  # noqa: F401
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(model_name=MODEL_ID)
    for name in names:
        if name not in manager.task_index:
            close = nearest_names(name, manager.all_tasks)
            hint = f"Nearest names: {', '.join(close)}." if close else "No name looks like it."
            raise EvaluationError(
                f"task {name!r} is unknown to lmms-eval, and no such file or directory exists.",
                f"{hint} Give one of those, a task YAML file, or a directory of them.",
            )
    for name in names:
        loaded = _guarded(
            f"task {name}",
            "its data set",
            partial(manager.load_task_or_group, [name], "simple"),
        )
        for member, task in _leaves(loaded):
            if member in tasks:
                raise EvaluationError(
                    f"task {member!r} is selected twice, the second time by {name!r}.",
                    "Leave one of them out.",
                )
            tasks[member] = task


def _leaves(loaded: dict[Any, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in loaded.items():
        found += _leaves(value) if isinstance(value, dict) else [(str(key), value)]
    return found


def _guarded(source: str, dataset: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    # Data sets come from disks, hubs and loading scripts, and fail in as many ways.
    except Exception as error:
        cause = root_cause(error)
        raise EvaluationError(
            f"{source}: loading {dataset} failed: {one_line(cause)}", _remedy(cause)
        ) from error


def root_cause(error: BaseException) -> BaseException:
    """Unwrap the retries that lmms-eval puts around loading and scoring."""
    from tenacity import RetryError

    while isinstance(error, RetryError):
        inner = error.last_attempt.exception()
        if inner is None:
            break
        error = inner
    return error


def _remedy(cause: BaseException) -> str:
    text = f"{type(cause).__name__} {cause}"
    if "TokenNotFound" in text or "gated" in text.lower() or "401" in text:
        return "This data set needs a login: run `hf auth login`, or set HF_TOKEN."
    if "unexpected keyword argument" in text:
        return "lmms-eval does not know that key: correct the task file."
    if "ConnectionError" in text or "OfflineMode" in text or "Couldn't reach" in text:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        return f"It is not in the local cache and the hub cannot be reached{offline}."
    return "Check the task file and its data."
