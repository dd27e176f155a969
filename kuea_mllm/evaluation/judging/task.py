"""Tasks whose answers a judge scores: lmms-eval only collects the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kuea_mllm.evaluation.columns import column_kind
from kuea_mllm.evaluation.judging.prompts import STOCK_TASKS, JudgedDocument, read_documents
from kuea_mllm.evaluation.lmms.loading import main_metric
from kuea_mllm.evaluation.statistics import RATIO_OF_SUMS


def take_over_scoring(name: str, task: Any) -> bool:
    """Keep a judged task from scoring its answers; say whether it is one.

    The stock tasks of LLaVA-Bench call a judge of their own while lmms-eval scores, and give 100
    where it fails. They are told to keep the answers only, as the tasks that we write are.

    Args:
        name: The task.
        task: lmms-eval's task object, changed in place.
    """
    metadata = dict(task.get_config("metadata") or {})
    if name in STOCK_TASKS and "kuea" not in metadata:
        metadata["kuea"] = {
            "column": STOCK_TASKS[name],
            "statistic": RATIO_OF_SUMS,
            "judged": True,
        }
        task.set_config("metadata", metadata)
    if not column_kind(name, task).judged:
        return False
    metric = str(main_metric(task))
    task.set_config("process_results", partial(_keep_category, metric))
    task.aggregation()[metric] = _no_number
    return True


def judged_documents(
    name: str, task: Any, samples: Sequence[Mapping[str, Any]]
) -> list[JudgedDocument]:
    """Collect what a judge has to know, from lmms-eval's rows of a task.

    Raises:
        EvaluationError: Naming task, document and key of what is missing.
    """
    kind = column_kind(name, task)
    rows = sorted((int(sample["doc_id"]), sample["doc"]) for sample in samples)
    return read_documents(name, rows, column=kind.column, protocol=kind.protocol)


def _keep_category(
    metric: str, document: Mapping[str, Any], results: Sequence[str]
) -> dict[str, Any]:
    extra = document.get("extra")
    category = (extra if isinstance(extra, Mapping) else document).get("category")
    # No "score": lmms-eval would compute with it.
    return {metric: {"group": None if category is None else str(category)}}


def _no_number(items: Sequence[Any]) -> None:
    """Stand in for an aggregation: without a judge there is nothing to aggregate."""
