"""Which tasks a suite is made of under a protocol, and where the data of each of them lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kuea_mllm.config.evaluate import SuiteSettings
from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.suites.sources import SOURCES, Source
from kuea_mllm.evaluation.suites.stock import STOCK, Stock, hub_name, is_hub_copy

HUB = "hub"
_WAYS = "--data DIR (with a sub-folder {name}), --set data.{name}=DIR"


@dataclass(frozen=True)
class DataFolders:
    """Where data sets were said to be.

    Attributes:
        root: Folder with a sub-folder for each data set.
        named: Folders of single data sets; they win.
    """

    root: str | None
    named: Mapping[str, str]

    def find(self, dataset: str) -> Path | None:
        """Return the folder that belongs to a data set, whether it is there or not."""
        if dataset in self.named:
            return Path(self.named[dataset])
        return None if self.root is None else Path(self.root, dataset)


@dataclass(frozen=True)
class PlannedColumn:
    """One column of a suite, before anything is read.

    Attributes:
        column: The column.
        task: Name of its task in lmms-eval and in the results.
        protocol: The protocol.
        source: What it asks: original files of ours, or a task of lmms-eval.
        folder: Where its data lie; None is the hub.
        problem: Why it cannot be run, with the remedy; None if nothing is known.
    """

    column: str
    task: str
    protocol: str
    source: Source | Stock
    folder: Path | None
    problem: DataError | None = None

    def require_folder(self) -> Path:
        """Return the folder of a column that reads original files.

        Raises:
            DataError: If there is none.
        """
        if self.problem is not None:
            raise self.problem
        if self.folder is None:
            raise DataError(f"column {self.column} has no folder.", "Pass --data DIR.")
        return self.folder

    @property
    def data(self) -> str:
        """The folder or hub repository, in words."""
        if self.folder is not None:
            return str(self.folder)
        return f"{HUB}: {hub_name(self.source)}" if isinstance(self.source, Stock) else "no folder"


def plan_columns(settings: SuiteSettings, folders: DataFolders) -> list[PlannedColumn]:
    """Find task and data of every column; opens no data set."""
    protocol = str(settings.protocol)
    planned = []
    for column in settings.chosen:
        name = task_name(protocol, column)
        source = SOURCES.get(protocol, {}).get(column)
        if source is None:
            stock = STOCK[column]
            folder, problem = _stock_folder(stock, folders)
            planned.append(PlannedColumn(column, name, protocol, stock, folder, problem))
        else:
            folder = folders.find(source.dataset)
            problem = _missing(source.dataset, folder)
            planned.append(PlannedColumn(column, name, protocol, source, folder, problem))
    return planned


def require_data(planned: list[PlannedColumn]) -> None:
    """Refuse a suite with data sets that are not there.

    Raises:
        DataError: Of the first one.
    """
    for column in planned:
        if column.problem is not None:
            raise column.problem


def task_name(protocol: str, column: str) -> str:
    """Name a task, such as `kuea_paper_refcoco_plus`."""
    return f"kuea_{_slug(protocol)}_{_slug(column)}"


def _slug(name: str) -> str:
    return name.lower().replace("+", "_plus").replace("-", "_")


def _missing(dataset: str, folder: Path | None) -> DataError | None:
    ways = _WAYS.format(name=dataset)
    if folder is None:
        return DataError(
            f"data set {dataset} has no folder.",
            f"Pass {ways}, or choose other columns with --columns.",
        )
    if not folder.is_dir():
        return DataError(
            f"folder {folder} of data set {dataset} does not exist.",
            f"Pass {ways}; docs/evaluation.md says what it has to hold.",
        )
    return None


def _stock_folder(stock: Stock, folders: DataFolders) -> tuple[Path | None, DataError | None]:
    folder = folders.find(stock.dataset)
    if stock.dataset in folders.named:
        # Asked for by name: what is wrong with it is said when the task is written.
        return folder, _missing(stock.dataset, folder)
    # A root may hold the original files, which the stock task cannot read.
    return (folder if folder is not None and is_hub_copy(folder, stock) else None), None
