"""`kuea-mllm eval` with a few-shot recipe, as far as it gets without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NAME = "flamingo_paper"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from kuea_mllm.evaluation.answering import opening

    class Adapter:
        def check_base(self, base: Path) -> None:
            pass

    monkeypatch.setattr(opening, "choose_adapter", lambda path, name: Adapter())
    return tmp_path


def dry_run(kuea: Any, model: Path, *options: str) -> Any:
    return kuea("eval", "-r", NAME, "--model", model, "-o", model / "out", "--dry-run", *options)


def test_shots_trials_and_folders_are_set_by_options(kuea: Any, model: Path) -> None:
    chosen = ["--set", f"data.vqav2={model}", "--set", "fewshot.datasets=[vqav2]"]
    answer = dry_run(kuea, model, "--shots", "0,8", "--trials", "2", "--json", *chosen)
    assert answer.code == 0, answer.err
    recipe = json.loads(answer.out)
    assert recipe["fewshot"]["shots"] == [0, 8]
    assert recipe["fewshot"]["trials"] == 2
    assert recipe["data"] == {"vqav2": str(model)}


def test_data_set_without_a_folder_is_named(kuea: Any, model: Path) -> None:
    answer = dry_run(kuea, model, "--set", f"data.coco={model}")
    assert answer.code == 2
    assert "data set flickr30k has no folder" in answer.err
    assert "--set data.flickr30k=DIR" in answer.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shots", "four"], "not a list of whole numbers"),
        (["--set", "data.cocoo=x"], "data.cocoo"),
    ],
)
def test_mistyped_options_are_named(
    options: list[str], message: str, kuea: Any, model: Path
) -> None:
    answer = dry_run(kuea, model, *options)
    assert answer.code == 2
    assert message in answer.err


def test_resumption_needs_something_to_resume(kuea: Any, model: Path) -> None:
    chosen = ["--set", f"data.vqav2={model}", "--set", "fewshot.datasets=[vqav2]"]
    answer = dry_run(kuea, model, *chosen, "--resume")
    assert answer.code == 2
    assert "there is no unfinished evaluation to resume" in answer.err
    column = model / "out.unfinished" / "columns" / "x"
    column.mkdir(parents=True)
    (column / "column.json").write_text("{}")
    (model / "out.unfinished" / "evaluation.json").write_text("{}")
    answer = dry_run(kuea, model, *chosen)
    assert answer.code == 2
    assert "(finished columns: 1)" in answer.err
    assert dry_run(kuea, model, *chosen, "--resume").code == 0
    assert dry_run(kuea, model, *chosen, "--restart").code == 0
