"""Protocol `lmms-eval`: tasks of lmms-eval as they are, from the hub or from a local copy.

A task file of ours includes the stock one and changes nothing but where its data are, and, for
TextVQA with OCR tokens, the switch that lmms-eval has and no task of it sets.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.errors import DataError, EnvironmentFailure
from kuea_mllm.evaluation.task_yaml import metadata
from kuea_mllm.evaluation.tasks import peek
from kuea_mllm.log import LOGGER


@dataclass(frozen=True)
class Stock:
    """One column as lmms-eval has it.

    Attributes:
        column: The column.
        dataset: Data set.
        file: Its task file, below lmms-eval's `tasks`.
        metric: The metric that is the column's score.
        statistic: How documents become that score.
        judged: Whether a language model grades the answers.
        documents: Size of the hub's copy; None where it is not known beforehand.
        per_unit: So many documents that follow each other are scored together.
        cluster: Key of what documents that depend on each other share, where it is no image.
        kwargs: What is changed in the task's `lmms_eval_specific_kwargs.default`.
    """

    column: str
    dataset: str
    file: str
    metric: str
    statistic: str = "mean"
    judged: bool = False
    documents: int | None = None
    per_unit: int = 1
    cluster: str | None = None
    kwargs: Mapping[str, Any] | None = None


_ACCURACY = "refcoco_ACC@0.5"
STOCK: dict[str, Stock] = {
    stock.column: stock
    for stock in (
        Stock("AI2D", "ai2d", "ai2d/ai2d.yaml", "exact_match", documents=3_088),
        Stock(
            "text-ocr",
            "textvqa",
            "textvqa/textvqa_val.yaml",
            "exact_match",
            documents=5_000,
            kwargs={"ocr": True},
        ),
        Stock("text-pure", "textvqa", "textvqa/textvqa_val.yaml", "exact_match", documents=5_000),
        Stock("pope", "pope", "pope/pope.yaml", "pope_accuracy", documents=9_000),
        Stock("RefCOCOg", "refcocog", "refcocog/refcocog_bbox_rec_val.yaml", _ACCURACY),
        Stock("RefCOCO+", "refcoco_plus", "refcoco+/refcoco+_bbox_rec_val.yaml", _ACCURACY),
        Stock("RefCOCO", "refcoco", "refcoco/refcoco_bbox_rec_val.yaml", _ACCURACY),
        Stock("vqa-v2", "vqav2", "vqav2/vqav2_val.yaml", "exact_match", documents=214_354),
        Stock(
            "llava-wild",
            "llava_bench_wild",
            "llava-in-the-wild/llava-in-the-wild.yaml",
            "gpt_eval_llava_all",
            statistic="ratio_of_sums",
            judged=True,
            documents=60,
        ),
        Stock(
            "llava-coco",
            "llava_bench_coco",
            "llava-bench-coco/llava-bench-coco.yaml",
            "gpt_eval_llava_all",
            statistic="ratio_of_sums",
            judged=True,
            documents=90,
        ),
        Stock(
            "MMVP",
            "mmvp",
            "mmvp/mmvp.yaml",
            "mmvp_pair_accuracy",
            statistic="all_right_in_cluster",
            documents=300,
            per_unit=2,
            cluster="pair_index",
        ),
    )
}


def stock_task(name: str, stock: Stock, suite: str, folder: Path | None) -> dict[str, Any]:
    """Return the content of a task file that runs a stock task.

    Args:
        name: Name of the task.
        stock: What it runs.
        suite: Suite of the column.
        folder: Local copy laid out like the hub repository; None takes the hub.
    """
    path = stock_file(stock)
    known = _read(path)
    content: dict[str, Any] = {
        "include": str(path),
        "task": name,
        # Without `token: true`: it asks for a login even where the data are public or local.
        "dataset_kwargs": {
            key: value
            for key, value in (known.get("dataset_kwargs") or {}).items()
            if key != "token"
        },
        "metadata": metadata(
            suite,
            "lmms-eval",
            stock.column,
            statistic=stock.statistic,
            judged=stock.judged,
            version=_version(known.get("metadata")),
        ),
    }
    # The stock file's tags would make the task a member of lmms-eval's groups.
    if "tag" in known:
        content["tag"] = None
    if stock.cluster is not None:
        content["cluster_key"] = stock.cluster
    if folder is not None:
        require_hub_copy(folder, stock)
        content["dataset_path"] = str(folder.resolve())
    if stock.kwargs is not None:
        # `include` merges top-level keys only.
        blocks = known["lmms_eval_specific_kwargs"]
        content["lmms_eval_specific_kwargs"] = {
            "default": {**blocks["default"], **stock.kwargs},
        }
    return content


def stock_file(stock: Stock) -> Path:
    """Return the task file of lmms-eval; does not import it.

    Raises:
        EnvironmentFailure: If the installed lmms-eval has no such file.
    """
    spec = importlib.util.find_spec("lmms_eval")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    for root in roots:
        path = Path(root, "tasks", *stock.file.split("/"))
        if path.is_file():
            return path
    raise EnvironmentFailure(
        f"lmms-eval has no task file tasks/{stock.file}.", "Install lmms-eval 0.7.3."
    )


def is_hub_copy(folder: Path, stock: Stock) -> bool:
    """Say whether a folder holds the task's split as parquet files, as the hub has them."""
    split = _read(stock_file(stock)).get("test_split")
    return folder.is_dir() and any(folder.rglob(f"{split}-*.parquet"))


def require_hub_copy(folder: Path, stock: Stock) -> None:
    """Refuse a folder that is no copy of the hub repository.

    Raises:
        DataError: Naming the folder and the file that is missing.
    """
    if is_hub_copy(folder, stock):
        return
    known = _read(stock_file(stock))
    files, hub = f"data/{known['test_split']}-*.parquet", known["dataset_path"]
    raise DataError(
        f"folder {folder} of data set {stock.dataset} holds no {files} (a copy of {hub} on the "
        "hub, protocol lmms-eval).",
        f"Run `hf download --repo-type dataset {hub} --local-dir {folder}`, or "
        "use --protocol paper, which reads the original files (docs/evaluation.md).",
    )


def count_documents(folder: Path, stock: Stock) -> int | None:
    """Count the documents of a local copy; None where the task makes several of one row."""
    known = _read(stock_file(stock))
    if "process_docs" in known:
        return None
    from pyarrow.parquet import read_metadata

    files = folder.rglob(f"{known['test_split']}-*.parquet")
    try:
        return sum(int(read_metadata(file).num_rows) for file in files)
    # pyarrow's ArrowInvalid is a ValueError.
    except (OSError, ValueError) as error:
        raise DataError(
            f"folder {folder} of data set {stock.dataset} holds a file that is no parquet: "
            f"{' '.join(str(error).split())}.",
            f"Get {known['dataset_path']} from the hub again.",
        ) from error


def say_hub(columns: Mapping[str, str]) -> None:
    """Say which columns take their data from the hub, and whether it may be reached."""
    if not columns:
        return
    offline = (
        "; HF_HUB_OFFLINE is set: only what is in the local cache is used"
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
        else ""
    )
    names = ", ".join(f"{column} ({repository})" for column, repository in columns.items())
    LOGGER.info("Data from the Hugging Face hub: %s%s.", names, offline)


def hub_name(stock: Stock) -> str:
    """Return the hub repository of a stock task."""
    return str(_read(stock_file(stock))["dataset_path"])


def _read(path: Path) -> dict[str, Any]:
    """Read a task file and what it includes, as lmms-eval merges them."""
    content = peek(path)
    included: dict[str, Any] = {}
    if isinstance(content.get("include"), str):
        included = _read(path.parent / str(content.pop("include")))
    return {**included, **content}


def _version(stated: Any) -> Any:
    entries = stated if isinstance(stated, list) else [stated]
    found = [
        entry["version"] for entry in entries if isinstance(entry, dict) and "version" in entry
    ]
    return found[0] if found else None
