"""`kuea-mllm eval --suite`, as far as it gets without loading weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kuea_mllm.miniworld import ASSETS

sys.path.append(str(Path(__file__).parents[1] / "unit" / "evaluation"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from suite_data import make_suite_data

    folder = tmp_path_factory.mktemp("data")
    make_suite_data(folder)
    return folder


@pytest.fixture
def dry_run(kuea: Any, tmp_path: Path) -> Any:
    model, out = ASSETS / "llava", tmp_path / "out"

    def call(*options: object) -> Any:
        answer = kuea("eval", f"--model={model}", f"--out={out}", "--dry-run", *options)
        assert not out.exists()
        assert "Traceback" not in answer.err
        return answer

    return call


def test_dry_run_lists_every_column(dry_run: Any, data: Path) -> None:
    answer = dry_run("--suite=llava-paper", f"--data={data}")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    pope = next(line for line in lines if line.startswith("pope "))
    assert pope.split()[:4] == ["pope", "11", "accuracy", "paper"]
    assert f"found: {data / 'pope'}" in pope
    judged = next(line for line in lines if line.startswith("llava-wild"))
    assert "no judge given" in judged


def test_missing_folders_are_listed_before_the_error(dry_run: Any, data: Path) -> None:
    answer = dry_run("--suite=quick", f"--set=data.vsr={data / 'vsr'}")
    assert answer.code == 2
    assert "data set textvqa has no folder" in answer.err
    lines = answer.out.splitlines()
    # At most as many as the limit of the recipe.
    assert next(line for line in lines if line.startswith("vsr")).split()[1] == "6"
    assert "missing: no folder" in next(line for line in lines if line.startswith("MMVP"))


def test_quick_suite_draws_with_a_stated_seed(dry_run: Any, data: Path) -> None:
    def recipe(*options: str) -> dict[str, Any]:
        answer = dry_run("--suite=quick", f"--data={data}", "--json", *options)
        assert answer.code == 0, answer.err
        content: dict[str, Any] = json.loads(answer.out)
        return content

    default = recipe()
    assert (default["limit"], default["limit_seed"]) == (256, 0)
    assert [entry["column"] for entry in default["columns"]] == [
        "text-pure",
        "pope",
        "vsr",
        "MMVP",
    ]
    other = recipe("--limit=3", "--limit-seed=7", "--columns=MMVP,vsr")
    assert other["limit_seed"] == 7
    counts = {entry["column"]: entry["documents"] for entry in other["columns"]}
    assert counts == {"vsr": 3, "MMVP": 2}


def test_hub_columns_say_where_their_data_come_from(dry_run: Any, data: Path) -> None:
    options = ["--suite=llava-paper", "--protocol=lmms-eval", "--columns=pope,vsr", "--json"]
    answer = dry_run(*options, f"--data={data}")
    assert answer.code == 0, answer.err
    columns = {entry["column"]: entry for entry in json.loads(answer.out)["columns"]}
    assert columns["pope"]["data"] == "hub: lmms-lab-encoder/POPE"
    assert columns["pope"]["state"] == "hub"
    assert columns["vsr"]["state"] == "found"
    answer = dry_run(*options, f"--set=data.pope={data / 'pope'}", f"--data={data}")
    assert answer.code == 2
    assert "holds no data/test-*.parquet" in answer.err


def test_few_shot_suite_takes_columns_and_protocol(dry_run: Any, tmp_path: Path) -> None:
    (tmp_path / "hatefulmemes").mkdir()
    answer = dry_run(
        "--suite=flamingo-paper",
        "--columns=HatefulMemes",
        "--protocol=open-flamingo-released",
        f"--data={tmp_path}",
        "--json",
    )
    assert answer.code == 0, answer.err
    recipe = json.loads(answer.out)
    assert recipe["fewshot"]["compat"] == "released"
    assert recipe["fewshot"]["datasets"] == ["hatefulmemes"]
    assert [entry["column"] for entry in recipe["columns"]] == ["HatefulMemes, 0/4/16 shots"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite=llava"], "nearest: llava-paper"),
        (["--suite=quick", "--protocol=padd"], "nearest: padded"),
        (["--suite=quick", "--columns=vrs"], "nearest: vsr"),
        (["--suite=quick", "--set=data.vrs=x"], "nearest: vsr"),
        (["--suite=quick", "--judge-model=gpt"], "'judge.url' is missing"),
        (["--recipe=align/miniworld", "--suite=quick"], "align/miniworld"),
        (["--suite=quick", "--data=no/such/folder"], "no/such/folder"),
        ([], "--suite"),
    ],
)
def test_mistyped_options_name_the_nearest(dry_run: Any, options: list[str], message: str) -> None:
    answer = dry_run(*options)
    assert answer.code == 2
    assert message in answer.err


def test_missing_image_is_named(dry_run: Any, tmp_path: Path) -> None:
    from suite_data import make_suite_data

    folder = make_suite_data(tmp_path / "copy")["vsr"]
    (folder / "images" / "000000085638.jpg").unlink()
    answer = dry_run("--suite=quick", "--columns=vsr", f"--set=data.vsr={folder}")
    assert answer.code == 2
    assert "000000085638.jpg does not exist" in answer.err


def test_written_recipe_runs_again_with_a_judge(dry_run: Any, data: Path, tmp_path: Path) -> None:
    first = dry_run("--suite=quick", "--columns=vsr", f"--data={data}")
    text, _, _ = first.out.partition("\n\n")
    (tmp_path / "run.yaml").write_text(text)
    answer = dry_run(
        f"--recipe={tmp_path / 'run.yaml'}",
        "--judge-url=http://localhost:1/v1",
        "--judge-model=m",
        "--json",
    )
    assert answer.code == 0, answer.err
    recipe = json.loads(answer.out)
    assert recipe["judge"]["model"] == "m"
    assert recipe["suite"]["columns"] == ["vsr"]


def test_both_models_are_looked_at(dry_run: Any, data: Path, tmp_path: Path) -> None:
    options = ["--suite=quick", f"--data={data}"]
    assert dry_run(*options, f"--against={ASSETS / 'llava'}").code == 0
    answer = dry_run(*options, "--against=no/such/model")
    assert answer.code == 2
    assert "no/such/model" in answer.err


def test_output_that_is_something_else_is_not_touched(
    kuea: Any, data: Path, tmp_path: Path
) -> None:
    model, out = ASSETS / "llava", tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    options = ["--suite=quick", f"--data={data}", f"--against={model}", "--restart"]
    answer = kuea("eval", f"--model={model}", f"--out={out}", *options)
    assert answer.code == 2
    assert "exists already" in answer.err
    assert (out / "mine.txt").read_text() == "mine"
