"""Which tasks a suite is made of, what is written for them, and which documents a limit keeps."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fewshot_data import write_all
from hypothesis import given
from hypothesis import strategies as st
from suite_data import make_suite_data

from kuea_mllm.config.evaluate import (
    LLAVA_COLUMNS,
    EvalRecipe,
    FewShotSettings,
    JudgeSettings,
    SuiteSettings,
)
from kuea_mllm.errors import DataError, RecipeError
from kuea_mllm.evaluation.fewshot.task_files import write_fewshot_tasks
from kuea_mllm.evaluation.jobs import read_wishes, warn_of_missing_judge
from kuea_mllm.evaluation.suites.preview import preview_columns
from kuea_mllm.evaluation.suites.registry import (
    DataFolders,
    PlannedColumn,
    plan_columns,
    require_data,
    task_name,
)
from kuea_mllm.evaluation.suites.stock import STOCK, count_documents, hub_name, stock_file
from kuea_mllm.evaluation.suites.subset import draw_positions
from kuea_mllm.evaluation.suites.task_files import SuiteTask, write_suite_tasks
from kuea_mllm.evaluation.tasks import peek


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {name: str(path) for name, path in make_suite_data(folder).items()}


def settings(protocol: str = "paper", *columns: str) -> SuiteSettings:
    return SuiteSettings(name="llava-paper", protocol=protocol, columns=list(columns) or None)


def write(folder: Path, chosen: SuiteSettings, data: dict[str, str], **limits: Any) -> Any:
    planned = plan_columns(chosen, DataFolders(None, data))
    return {task.column: task for task in write_suite_tasks(folder, chosen, planned, **limits)}


def rows_of(task: SuiteTask) -> list[dict[str, Any]]:
    lines = task.path.with_suffix(".jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(0, 5)),
)
def test_limit_keeps_whole_units(units: list[Hashable], limit: int, seed: int | None) -> None:
    kept = draw_positions(units, limit, seed)
    assert kept == sorted(set(kept))
    assert kept
    chosen = {units[place] for place in kept}
    assert kept == [place for place, unit in enumerate(units) if unit in chosen]
    assert len(kept) <= limit or len(chosen) == 1
    assert kept == draw_positions(units, limit, seed)


def test_limit_without_a_seed_takes_the_first() -> None:
    assert draw_positions(range(100), 7, None) == list(range(7))
    assert draw_positions(range(100), None, None) == list(range(100))
    assert draw_positions("aabbcc", 5, None) == [0, 1, 2, 3]


def test_smaller_limit_is_part_of_a_larger_one() -> None:
    small, large = (set(draw_positions(range(1000), limit, 0)) for limit in (50, 200))
    assert small < large
    assert large != set(range(200))
    assert large != set(draw_positions(range(1000), 200, 1))
    # A uniform draw of 200 of 1,000 has a mean of 500 with a standard error of 18.
    assert abs(sum(large) / 200 - 500) < 75


def test_written_task_says_what_it_is(tmp_path: Path, data: dict[str, str]) -> None:
    tasks = write(tmp_path, settings(), data)
    assert list(tasks) == list(LLAVA_COLUMNS)
    content = peek(tasks["pope"].path)
    assert content["task"] == "kuea_paper_pope"
    assert content["metadata"] == {
        "version": 1.0,
        "kuea": {
            "suite": "llava-paper",
            "protocol": "paper",
            "column": "pope",
            "statistic": "mean_of_groups",
            "judged": False,
        },
    }
    assert content["generation_kwargs"] == {"candidates": ["Yes", "No"], "max_new_tokens": 1}
    assert content["cluster_key"] == "image_id"
    text = peek(tasks["text-ocr"].path)["generation_kwargs"]
    assert text == {"max_new_tokens": 128, "do_sample": False}
    assert tasks["llava-wild"].judged
    assert len(rows_of(tasks["pope"])) == tasks["pope"].documents == 11
    assert all(Path(row["image"]).is_absolute() for row in rows_of(tasks["RefCOCO+"]))


def test_names_of_tasks_hold_protocol_and_column() -> None:
    assert task_name("lmms-eval", "RefCOCO+") == "kuea_lmms_eval_refcoco_plus"
    names = {task_name(p, c) for p in ("paper", "padded", "lmms-eval") for c in LLAVA_COLUMNS}
    assert len(names) == 3 * len(LLAVA_COLUMNS)


def test_limited_task_holds_the_drawn_rows(tmp_path: Path, data: dict[str, str]) -> None:
    chosen = settings("paper", "MMVP", "text-ocr", "text-pure")
    for name in ("all", "one", "again", "other"):
        (tmp_path / name).mkdir()
    every = write(tmp_path / "all", chosen, data)
    one = write(tmp_path / "one", chosen, data, limit=5, limit_seed=0)
    again = write(tmp_path / "again", chosen, data, limit=5, limit_seed=0)
    other = write(tmp_path / "other", chosen, data, limit=5, limit_seed=3)
    for column, task in one.items():
        rows = rows_of(task)
        assert rows == rows_of(again[column])
        assert task.content == again[column].content != every[column].content
        assert [row for row in rows_of(every[column]) if row in rows] == rows
    pairs = [row["unit"] for row in rows_of(one["MMVP"])]
    assert len(pairs) == 4
    assert all(pairs.count(pair) == 2 for pair in pairs)
    assert any(rows_of(one[column]) != rows_of(other[column]) for column in one)
    # Two columns of one data set are asked about the same questions.
    images = [
        [row["image"] for row in rows_of(one[column])] for column in ("text-ocr", "text-pure")
    ]
    assert images[0] == images[1]


def test_images_outside_of_a_limit_need_not_be_there(tmp_path: Path, data: dict[str, str]) -> None:
    chosen = settings("paper", "MMVP")
    kept = rows_of(write(tmp_path, chosen, data, limit=2, limit_seed=0)["MMVP"])
    folder = make_suite_data(tmp_path / "copy")["mmvp"]
    for image in (folder / "MMVP Images").iterdir():
        if image.name not in {Path(row["image"]).name for row in kept}:
            image.unlink()
    copy = {"mmvp": str(folder)}
    assert len(rows_of(write(tmp_path, chosen, copy, limit=2, limit_seed=0)["MMVP"])) == 2
    with pytest.raises(DataError, match=r"mmvp.* does not exist, nor do 5 others"):
        write(tmp_path, chosen, copy)


def test_named_folder_wins_over_the_root(tmp_path: Path) -> None:
    (tmp_path / "root" / "vsr").mkdir(parents=True)
    folders = DataFolders(str(tmp_path / "root"), {"pope": str(tmp_path / "elsewhere")})
    vsr, pope = plan_columns(settings("paper", "vsr", "pope"), folders)[::-1]
    assert vsr.folder == tmp_path / "root" / "vsr"
    assert vsr.problem is None
    assert pope.folder == tmp_path / "elsewhere"
    with pytest.raises(DataError, match="elsewhere of data set pope does not exist"):
        require_data([vsr, pope])


def test_stock_tasks_exist_and_keep_what_they_ask(tmp_path: Path) -> None:
    for stock in STOCK.values():
        assert stock_file(stock).is_file()
        assert "/" in hub_name(stock)
    chosen = settings("lmms-eval", *STOCK)
    tasks = write(tmp_path, chosen, {})
    with_ocr = yaml.safe_load(tasks["text-ocr"].path.read_text())
    assert with_ocr["lmms_eval_specific_kwargs"]["default"] == {
        "pre_prompt": "",
        "post_prompt": "\nAnswer the question using a single word or phrase.",
        "ocr": True,
    }
    for column, task in tasks.items():
        content = yaml.safe_load(task.path.read_text())
        assert "token" not in content["dataset_kwargs"]
        assert content["metadata"]["kuea"]["protocol"] == "lmms-eval"
        changed = set(content) - {"include", "task", "dataset_kwargs", "metadata", "tag"}
        expected = {"text-ocr": {"lmms_eval_specific_kwargs"}, "MMVP": {"cluster_key"}}
        assert changed == expected.get(column, set())


def test_root_with_original_files_leaves_stock_tasks_to_the_hub(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "pope").mkdir(parents=True)
    copy = root / "ai2d" / "data"
    copy.mkdir(parents=True)
    (copy / "test-00000-of-00001.parquet").touch()
    chosen = settings("lmms-eval", "AI2D", "pope")
    planned: list[PlannedColumn] = plan_columns(chosen, DataFolders(str(root), {}))
    assert [column.folder for column in planned] == [root / "ai2d", None]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with caplog.at_level("INFO", logger="kuea_mllm"):
        tasks = write_suite_tasks(tmp_path, chosen, planned)
    assert "pope (lmms-lab-encoder/POPE); HF_HUB_OFFLINE is set" in caplog.text
    assert yaml.safe_load(tasks[0].path.read_text())["dataset_path"] == str(root / "ai2d")
    assert "dataset_path" not in yaml.safe_load(tasks[1].path.read_text())


def test_missing_judge_is_said_at_once(
    data: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def warned(columns: tuple[str, ...], judge: JudgeSettings | None = None) -> bool:
        wishes = read_wishes(
            [],
            suite=settings("paper", *columns),
            fewshot=None,
            data=data,
            data_root=None,
            limit=None,
            limit_seed=0,
        )
        return warn_of_missing_judge(wishes, judge)

    assert not warned(("vsr",))
    assert warned(("llava-wild", "vsr"), JudgeSettings(url="http://x", model="m"))
    assert not caplog.records
    assert warned(("llava-wild", "vsr"))
    assert "llava-wild: answers are graded" in caplog.text


def test_local_copy_is_counted(tmp_path: Path) -> None:
    from pyarrow import table
    from pyarrow.parquet import write_table

    (tmp_path / "data").mkdir()
    for part in range(2):
        write_table(
            table({"x": [1, 2, 3]}), tmp_path / "data" / f"test-0000{part}-of-00002.parquet"
        )
    assert count_documents(tmp_path, STOCK["pope"]) == 6
    # Each of its rows becomes several.
    assert count_documents(tmp_path, STOCK["RefCOCO"]) is None
    (tmp_path / "data" / "test-00000-of-00002.parquet").write_text("no table")
    with pytest.raises(DataError, match="no parquet"):
        count_documents(tmp_path, STOCK["pope"])


def test_few_shot_columns_are_those_of_the_suite(tmp_path: Path) -> None:
    folders = write_all(tmp_path / "data")
    (tmp_path / "tasks").mkdir()
    few = FewShotSettings(datasets=["vqav2", "hatefulmemes"], shots=[0, 2], compat="released")
    tasks = write_fewshot_tasks(tmp_path / "tasks", few, folders)
    stated = [peek(task.path)["metadata"]["kuea"] for task in tasks]
    assert [entry["column"] for entry in stated] == [
        "VQAv2, 0 shots",
        "VQAv2, 2 shots",
        "HatefulMemes, 0 shots",
        "HatefulMemes, 2 shots",
    ]
    assert {entry["protocol"] for entry in stated} == {"open-flamingo-released"}
    assert [entry["statistic"] for entry in stated] == ["mean"] * 2 + ["roc_auc"] * 2


@pytest.mark.parametrize(
    ("samples", "limit", "shown"), [(None, None, None), (500, None, 500), (500, 8, 8), (None, 8, 8)]
)
def test_preview_counts_the_few_shot_documents_that_are_asked(
    samples: int | None, limit: int | None, shown: int | None, tmp_path: Path
) -> None:
    few = FewShotSettings(datasets=["vqav2"], shots=[0], num_samples=samples)
    folders = DataFolders(str(tmp_path), {})
    (entry,), _ = preview_columns(None, few, folders, limit=limit, limit_seed=None)
    assert entry["documents"] == shown


@pytest.mark.parametrize("compat", ["correct", "released"])
def test_few_shot_limit_can_be_drawn(tmp_path: Path, compat: Any) -> None:
    folders = write_all(tmp_path / "data")
    few = FewShotSettings(datasets=["vqav2"], shots=[2], compat=compat)
    asked = {}
    for seed in (None, 0):
        folder = tmp_path / f"tasks-{seed}"
        folder.mkdir()
        write_fewshot_tasks(folder, few, folders, limit=2, limit_seed=seed)
        lines = (folder / "vqav2.jsonl").read_text().splitlines()
        asked[seed] = [json.loads(line)["document"] for line in lines]
    assert asked == {None: [0, 1], 0: draw_positions(range(4), 2, 0)}
    assert asked[0] != [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"suite": {"name": "llava-papr"}}, "nearest: llava-paper"),
        ({"suite": {"name": "quick", "protocol": "pad"}}, "no protocol 'pad' \\(nearest: padded"),
        ({"suite": {"name": "llava-paper", "columns": ["Refcoco"]}}, "nearest: RefCOCO"),
        ({"suite": {"name": "quick", "columns": ["vsr", "vsr"]}}, "holds an entry twice"),
        ({"suite": {"name": "flamingo-paper", "columns": ["coco"]}}, "nearest: COCO"),
        ({"suite": {"name": "flamingo-paper", "protocol": "paper"}}, "nearest|known"),
        ({"suite": {"name": "quick"}, "data": {"popee": "x"}}, "data.popee \\(nearest: pope"),
        ({"suite": {"name": "quick"}, "fewshot": {}}, "two evaluations of different protocols"),
        ({"suite": {"name": "quick"}, "backend_args": {"a": "b"}}, "belongs to another backend"),
        ({"suite": {"name": "quick"}, "judge": {"url": "http://x"}}, "'judge.model' is missing"),
    ],
)
def test_impossible_suites_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        EvalRecipe.parse({"kind": "eval", **content}, origin="test")


def test_few_shot_suite_and_settings_agree() -> None:
    def parse(**content: Any) -> EvalRecipe:
        recipe = EvalRecipe.parse({"kind": "eval", **content}, origin="test")
        assert EvalRecipe.parse(recipe.model_dump(mode="json"), origin="again") == recipe
        return recipe

    suite = {"name": "flamingo-paper"}
    released = parse(suite=suite, fewshot={"compat": "released", "datasets": ["coco"]})
    assert released.suite is not None
    assert released.suite.protocol == "open-flamingo-released"
    assert released.suite.columns == ["COCO"]
    by_suite = parse(suite={**suite, "protocol": "open-flamingo-released", "columns": ["OK-VQA"]})
    assert by_suite.fewshot is not None
    assert by_suite.fewshot.compat == "released"
    assert by_suite.fewshot.datasets == ["okvqa"]
    assert by_suite.limit_seed == 0
    assert parse(suite=suite, limit_seed=None).limit_seed is None
    assert parse(tasks=["pope"]).limit_seed is None
