"""What the documents of a task are recognised by."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compare_data import write_results
from datasets import Dataset, load_dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.column_run import require_same_content, require_same_questions
from kuea_mllm.evaluation.content import hash_documents
from kuea_mllm.evaluation.jobs import Job
from kuea_mllm.evaluation.unfinished import Identity, Unfinished
from kuea_mllm.io import write_json

ROWS: list[dict[str, Any]] = [
    {
        "question": f"q{number}",
        "note": None if number % 3 else "n",
        "image": {"bytes": b"%d" % number},
    }
    for number in range(600)
]

Load = Callable[..., Any]


def task_of(documents: Any) -> SimpleNamespace:
    config = SimpleNamespace(test_split=None, validation_split="val")
    return SimpleNamespace(dataset={"val": documents}, config=config)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write rows as a copy of a hub repository and read it as lmms-eval does, never cached."""
    disable_progress_bar()

    def load(rows: list[dict[str, Any]], card: str = "a") -> Any:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        folder = tmp_path / "copy"
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(f"---\npretty_name: {card}\n---\n")
        Dataset.from_list(rows).to_parquet(str(folder / "val-00000-of-00001.parquet"))
        Dataset.from_list(rows[:5]).to_parquet(str(folder / "test-00000-of-00001.parquet"))
        os.utime(folder / "val-00000-of-00001.parquet", (len(card), len(card)))
        found = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
        return found["validation"]

    yield load
    enable_progress_bar()


def test_same_rows_have_the_same_hash_whatever_files_and_caches_do(load: Load) -> None:
    before = load(ROWS)
    known = hash_documents(task_of(before))
    drawn = hash_documents(task_of(before.select([3, 99, 256, 511])))
    again = load(ROWS, card="another card")
    assert hash_documents(task_of(again)) == known
    assert hash_documents(task_of(again.select([3, 99, 256, 511]))) == drawn
    assert drawn != known


@pytest.mark.parametrize(
    "change", [{"question": "q?"}, {"note": ""}, {"image": {"bytes": b"another"}}]
)
def test_any_change_of_a_row_that_is_asked_changes_the_hash(
    change: Mapping[str, Any], load: Load
) -> None:
    known = load(ROWS)
    hashes = [hash_documents(task_of(known), limit) for limit in (None, 301, 300)]
    changed = load([*ROWS[:300], {**ROWS[300], **change}, *ROWS[301:]])
    now = [hash_documents(task_of(changed), limit) for limit in (None, 301, 300)]
    assert [a == b for a, b in zip(hashes, now, strict=True)] == [False, False, True]


def test_order_and_number_of_rows_count() -> None:
    documents = Dataset.from_list(ROWS[:4])
    others = [documents.select([1, 0, 2, 3]), documents.select([0, 1, 2])]
    hashes = {hash_documents(task_of(rows)) for rows in (documents, *others)}
    assert len(hashes) == 3


def test_rows_of_another_kind_have_no_hash() -> None:
    assert hash_documents(task_of([{"question": "q"}])) is None


def test_finished_column_of_other_documents_is_refused(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path, Identity({}, {}), is_resumed=True)
    kept.column("pope").mkdir(parents=True)
    write_json(kept.column("pope") / "column.json", {"content": "before"})
    job = Job("pope", dict, data="data set pope (/copies/pope)", content="before")
    require_same_content(kept, {"pope": job, "unfinished": Job("unfinished", dict, content="now")})
    with pytest.raises(
        EvaluationError, match=r"files of data set pope \(/copies/pope\) have changed"
    ):
        require_same_content(kept, {"pope": Job("pope", dict, data=job.data, content="now")})


def test_results_of_another_model_on_other_data_are_refused(tmp_path: Path) -> None:
    asked = write_results(tmp_path / "old", {"pope": [1.0]}, column={"content": "before"})
    unknown = write_results(tmp_path / "older", {"pope": [1.0]})
    job = Job("pope", dict, data="data set pope", content="before")
    require_same_questions(asked, {"pope": job, "vsr": Job("vsr", dict, content="now")})
    changed = {"pope": Job("pope", dict, data=job.data, content="now")}
    require_same_questions(unknown, changed)
    with pytest.raises(EvaluationError, match=r"images of pope .* files of data set pope have"):
        require_same_questions(asked, changed)
