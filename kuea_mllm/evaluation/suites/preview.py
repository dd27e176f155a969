"""What an evaluation would ask, column by column, without a model: the plan of `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kuea_mllm.config.evaluate import (
    FLAMINGO_COLUMNS,
    FLAMINGO_PROTOCOLS,
    FLAMINGO_SUITE,
    FewShotSettings,
    SuiteSettings,
)
from kuea_mllm.errors import UserError
from kuea_mllm.evaluation.suites.registry import DataFolders, PlannedColumn, plan_columns
from kuea_mllm.evaluation.suites.stock import Stock, count_documents, require_hub_copy
from kuea_mllm.evaluation.suites.task_files import read_documents

FOUND, MISSING, UNUSABLE, HUB = "found", "missing", "not usable", "hub"


def preview_columns(
    suite: SuiteSettings | None,
    fewshot: FewShotSettings | None,
    folders: DataFolders,
    *,
    limit: int | None,
    limit_seed: int | None,
) -> tuple[list[dict[str, Any]], UserError | None]:
    """Look at every column of a suite, its files and images included.

    Returns:
        One plain dictionary per column, and the first problem that would stop the run.
    """
    entries: list[dict[str, Any]] = []
    problems: list[UserError] = []
    if suite is not None and suite.name != FLAMINGO_SUITE:
        for column in plan_columns(suite, folders):
            entry, problem = _preview(column, limit, limit_seed)
            entries.append(entry)
            problems += [] if problem is None else [problem]
    if fewshot is not None:
        entries += _preview_fewshot(fewshot, folders, limit)
    return entries, next(iter(problems), None)


def preview_lines(entries: Sequence[dict[str, Any]], *, has_judge: bool) -> list[str]:
    """Lay the columns out as lines of text."""
    head = ["column", "documents", "metric", "protocol", "data", ""]
    cells = [head]
    for entry in entries:
        count = "not known" if entry["documents"] is None else f"{entry['documents']:,}"
        note = "" if has_judge or not entry["judged"] else "no judge given: will have no score"
        data = f"{entry['state']}: {entry['data']}" if entry["state"] != HUB else entry["data"]
        cells.append([entry["column"], count, entry["metric"], entry["protocol"], data, note])
    widths = [max(len(row[place]) for row in cells) for place in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _preview(
    column: PlannedColumn, limit: int | None, limit_seed: int | None
) -> tuple[dict[str, Any], UserError | None]:
    source, problem = column.source, column.problem
    error: UserError | None = problem
    documents = source.documents
    state = HUB if column.folder is None and isinstance(source, Stock) else FOUND
    if problem is not None:
        state = MISSING
    elif not isinstance(source, Stock):
        try:
            documents = len(read_documents(column, source, limit, limit_seed))
        except UserError as caught:
            state, error = UNUSABLE, caught
    elif column.folder is not None:
        try:
            require_hub_copy(column.folder, source)
            documents = count_documents(column.folder, source)
        except UserError as caught:
            state, error = UNUSABLE, caught
    is_counted = error is None and not isinstance(source, Stock)
    if documents is not None and limit is not None and not is_counted:
        documents = min(documents, limit)
    entry = {
        "column": column.column,
        "task": column.task,
        "protocol": column.protocol,
        "metric": source.metric,
        "statistic": source.statistic,
        "documents": documents,
        "dataset": source.dataset,
        "data": column.data,
        "state": state,
        "judged": source.judged,
    }
    return entry, error


def _preview_fewshot(
    settings: FewShotSettings, folders: DataFolders, limit: int | None
) -> list[dict[str, Any]]:
    asked = [count for count in (settings.num_samples, limit) if count is not None]
    protocols = {compat: protocol for protocol, compat in FLAMINGO_PROTOCOLS.items()}
    shown = {name: column for column, name in FLAMINGO_COLUMNS.items()}
    shots = "/".join(str(count) for count in settings.shots)
    entries = []
    for name in settings.datasets:
        folder = folders.find(name)
        entries.append(
            {
                "column": f"{shown[name]}, {shots} shots",
                "task": f"{name}_<shots>shot_seed<seed>",
                "protocol": protocols[settings.compat],
                "metric": _FEWSHOT_METRICS.get(name, "vqa_accuracy"),
                "statistic": "roc_auc" if name == "hatefulmemes" else "mean",
                "documents": min(asked, default=None),
                "dataset": name,
                "data": str(folder or "no folder"),
                "state": FOUND if folder is not None and Path(folder).is_dir() else MISSING,
                "judged": False,
            }
        )
    return entries


_FEWSHOT_METRICS = {"coco": "cider", "flickr30k": "cider", "hatefulmemes": "roc_auc"}
