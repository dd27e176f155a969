"""Writing the tasks of a suite for lmms-eval: YAML files and the rows that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kuea_mllm.config.evaluate import SuiteSettings
from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.suites.documents import Document, document_row, require_images
from kuea_mllm.evaluation.suites.registry import PlannedColumn, require_data
from kuea_mllm.evaluation.suites.sources import Source
from kuea_mllm.evaluation.suites.stock import (
    STOCK,
    Stock,
    hub_name,
    say_hub,
    stock_file,
    stock_task,
)
from kuea_mllm.evaluation.suites.subset import draw_positions
from kuea_mllm.evaluation.task_yaml import (
    Function,
    WrittenTask,
    hash_files,
    metadata,
    rows_of,
    write_lines,
    write_yaml,
)
from kuea_mllm.log import LOGGER

_DOCUMENTS = "kuea_mllm.evaluation.suites.documents"


@dataclass(frozen=True)
class SuiteTask(WrittenTask):
    """One column of a suite that was written.

    Attributes:
        column: The column.
        judged: Whether a language model grades the answers.
        is_stock: Whether lmms-eval has the task and reads the data.
        per_unit: Of a stock task: so many documents that follow each other belong together.
        documents: How many there are to ask; None of a stock task.
        generation: How they are to be answered; empty of a stock task.
    """

    column: str
    judged: bool
    is_stock: bool
    per_unit: int = 1
    documents: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


def write_suite_tasks(
    folder: Path,
    settings: SuiteSettings,
    planned: Sequence[PlannedColumn],
    *,
    limit: int | None = None,
    limit_seed: int | None = None,
) -> list[SuiteTask]:
    """Write the tasks of a run into a folder, with all that they need but the images.

    Everything that can be missing is looked for here, before a model is opened: files and their
    keys, and the images of all documents that are asked.

    Args:
        folder: Existing folder; the files name it by its absolute path.
        settings: The suite.
        planned: Its columns.
        limit: Documents of each task; others are left out.
        limit_seed: Draw them at random with this seed; None takes the first.

    Raises:
        UserError: If a folder, file, key or image is missing.
    """
    require_data(list(planned))
    folder = folder.resolve()
    say_hub(
        {
            column.column: hub_name(column.source)
            for column in planned
            if isinstance(column.source, Stock) and column.folder is None
        }
    )
    tasks = []
    for column in planned:
        if isinstance(column.source, Stock):
            tasks.append(_write_stock(folder, settings, column, column.source))
        else:
            tasks.append(_write_own(folder, settings, column, column.source, (limit, limit_seed)))
    return tasks


def _write_stock(
    folder: Path, settings: SuiteSettings, column: PlannedColumn, stock: Stock
) -> SuiteTask:
    path = folder / f"{column.task}.yaml"
    content = stock_task(column.task, stock, settings.name, column.folder)
    write_yaml(path, content)
    return SuiteTask(
        column.task,
        stock.dataset,
        path,
        hash_files(stock_file(stock), also=content),
        column.column,
        stock.judged,
        is_stock=True,
        per_unit=STOCK[column.column].per_unit,
    )


def _write_own(
    folder: Path,
    settings: SuiteSettings,
    column: PlannedColumn,
    source: Source,
    limits: tuple[int | None, int | None],
) -> SuiteTask:
    documents = read_documents(column, source, *limits)
    rows = folder / f"{column.task}.jsonl"
    write_lines(rows, (document_row(document) for document in documents))
    path = folder / f"{column.task}.yaml"
    content = _own_task(column, source, settings.name, rows)
    write_yaml(path, content)
    LOGGER.info("%s: %d documents from %s.", column.column, len(documents), column.folder)
    shown = {key: content[key] for key in ("generation_kwargs", "process_results", "metadata")}
    return SuiteTask(
        column.task,
        source.dataset,
        path,
        hash_files(rows, also=shown),
        column.column,
        source.judged,
        is_stock=False,
        documents=len(documents),
        generation=source.generation,
    )


def read_documents(
    column: PlannedColumn, source: Source, limit: int | None, limit_seed: int | None
) -> list[Document]:
    """Read the documents of a column that are asked, and look for their images.

    Raises:
        DataError: Naming file and key, or the image.
    """
    # Relative paths would change their meaning with the folder lmms-eval runs in.
    every = source.read(column.require_folder().absolute())
    if not every:
        raise DataError(
            f"data set {source.dataset} ({column.folder}) has no documents for column "
            f"{column.column}.",
            "docs/evaluation.md says what it has to hold.",
        )
    units = ((n if unit is None else unit) for n, unit in enumerate(d.unit for d in every))
    documents = [every[n] for n in draw_positions(units, limit, limit_seed)]
    require_images(documents, source.dataset)
    return documents


def _own_task(column: PlannedColumn, source: Source, suite: str, rows: Path) -> dict[str, Any]:
    return {
        "task": column.task,
        **rows_of(rows),
        "doc_to_visual": Function(f"{_DOCUMENTS}.to_visual"),
        "doc_to_text": Function(f"{_DOCUMENTS}.to_text"),
        "doc_to_target": Function(f"{_DOCUMENTS}.to_target"),
        "generation_kwargs": dict(source.generation),
        "process_results": Function(source.process),
        "cluster_key": "image_id",
        "metric_list": [
            {
                "metric": source.metric,
                "aggregation": Function(source.aggregate),
                "higher_is_better": True,
            }
        ],
        "metadata": metadata(
            suite,
            column.protocol,
            column.column,
            statistic=source.statistic,
            judged=source.judged,
        ),
    }
