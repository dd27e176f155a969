"""The directory of an evaluation that is not complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kuea_mllm.errors import EnvironmentFailure, OutputError, RecipeError, UserError
from kuea_mllm.evaluation.column_run import gather_columns
from kuea_mllm.evaluation.unfinished import (
    Identity,
    Unfinished,
    fingerprint_files,
    finished_columns,
    open_unfinished,
    require_startable,
    unfinished_path,
)
from kuea_mllm.io import write_json

IDENTITY = Identity(
    {"batch_size": 8, "fewshot": {"shots": [0, 4]}, "tasks": {"mme": "x"}}, {"torch": "2"}
)


def finish(unfinished: Unfinished, *tasks: str) -> None:
    for task in tasks:
        folder = unfinished.column(task)
        folder.mkdir(parents=True)
        write_json(folder / "column.json", {})


def stop_after(out: Path, *tasks: str) -> None:
    """Begin an evaluation and lose it when some tasks are finished."""
    with (
        pytest.raises(KeyboardInterrupt),
        open_unfinished(out, IDENTITY, resume=False, restart=False) as unfinished,
    ):
        unfinished.claim("model")
        finish(unfinished, *tasks)
        raise KeyboardInterrupt


def test_nothing_is_left_without_a_finished_column(tmp_path: Path) -> None:
    stop_after(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_finished_columns_survive_and_success_removes_the_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(out, "a/b")
    killed = unfinished_path(out) / "columns" / ".c.partial-x"
    killed.mkdir()
    write_json(killed / "column.json", {})
    assert finished_columns(unfinished_path(out)) == 1
    with open_unfinished(out, IDENTITY, resume=True, restart=False) as unfinished:
        unfinished.claim("model")
        assert unfinished.is_finished("a/b")
        assert not unfinished.is_finished("c")
    assert not unfinished_path(out).exists()


def test_what_is_kept_is_told_in_words_that_fit_every_verb(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop_in(out: Path, *, is_begun: bool) -> str:
        caplog.clear()
        with (
            pytest.raises(KeyboardInterrupt),
            open_unfinished(out, IDENTITY, resume=False, restart=False) as unfinished,
        ):
            unfinished.claim("model")
            finish(unfinished, "a", "b")
            if is_begun:
                unfinished.work("c").mkdir(parents=True)
                write_json(unfinished.work("c") / "epoch.json", {})
            raise KeyboardInterrupt
        return caplog.messages[-1]

    kept = stop_in(tmp_path / "x", is_begun=False)
    assert kept.endswith("x.unfinished: finished columns: 2. Go on with --resume.")
    kept = stop_in(tmp_path / "y", is_begun=True)
    assert kept.endswith("columns: 2, and what was done of another. Go on with --resume.")


def test_restart_drops_finished_columns(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(out, "a")
    require_startable(out, resume=False, restart=True)
    with open_unfinished(out, IDENTITY, resume=False, restart=True) as unfinished:
        # Another model: what was there is nothing to compare with.
        unfinished.claim("another model")
        assert not unfinished.is_finished("a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": False, "restart": False}, r"unfinished evaluation lies in .*columns: 1\)"),
        ({"resume": True, "restart": True}, "exclude each other"),
    ],
)
def test_unfinished_evaluation_is_not_touched_unasked(
    options: dict[str, bool], message: str, tmp_path: Path
) -> None:
    stop_after(tmp_path / "out", "a")
    with pytest.raises(OutputError, match=message):
        require_startable(tmp_path / "out", **options)


def test_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = unfinished_path(tmp_path / "out")
    folder.mkdir()
    (folder / "run.yaml").write_text("kind: align")
    with pytest.raises(OutputError, match="is no unfinished evaluation"):
        require_startable(tmp_path / "out", resume=False, restart=True)
    with pytest.raises(OutputError, match=r"nothing\.unfinished does not exist"):
        require_startable(tmp_path / "nothing", resume=True, restart=False)


def test_two_processes_do_not_work_on_one_evaluation(tmp_path: Path) -> None:
    with (
        open_unfinished(tmp_path / "out", IDENTITY, resume=False, restart=False),
        pytest.raises(OutputError, match="another process is working on"),
        open_unfinished(tmp_path / "out", IDENTITY, resume=False, restart=True),
    ):
        raise AssertionError("was opened twice")


def claim_again(out: Path, model: str = "model", **changes: Any) -> None:
    identity = Identity({**IDENTITY.settings, **changes}, IDENTITY.versions)
    with open_unfinished(out, identity, resume=True, restart=False) as unfinished:
        unfinished.claim(model)
        raise EnvironmentFailure("claimed")


def test_batch_size_may_change_and_shots_may_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(out, "a")
    with pytest.raises(EnvironmentFailure, match="claimed"):
        claim_again(out, batch_size=2)
    with pytest.raises(RecipeError, match=r"key 'fewshot.shots' is \[0\], .* \[0, 4\]"):
        claim_again(out, fewshot={"shots": [0]})
    with pytest.raises(RecipeError, match=r"key 'tasks\.pope' is 'x', .* with 'nothing'"):
        claim_again(out, tasks={"mme": "x", "pope": "x"})
    with pytest.raises(UserError, match="model is not that of the unfinished"):
        claim_again(out, "another")


def test_every_file_of_a_model_counts_but_its_card(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = fingerprint_files(tmp_path)
    (tmp_path / "README.md").write_text("card")
    (tmp_path / ".cache").mkdir()
    assert fingerprint_files(tmp_path) == first
    (tmp_path / "config.json").write_text("{}")
    second = fingerprint_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weighty")
    third = fingerprint_files(tmp_path)
    # A tower may lie in a folder of its own.
    (tmp_path / "clip_vision_tower").mkdir()
    (tmp_path / "clip_vision_tower" / "model.safetensors").write_bytes(b"tower")
    assert len({first, second, third, fingerprint_files(tmp_path)}) == 4


def test_lmms_results_of_columns_become_one(tmp_path: Path) -> None:
    unfinished = Unfinished(tmp_path / "out.unfinished", IDENTITY, is_resumed=False)
    for number, task in enumerate(("a", "b")):
        finish(unfinished, task)
        folder = unfinished.column(task) / "lmms" / "model"
        folder.mkdir(parents=True)
        (folder / f"2026_{number}_samples_{task}.jsonl").write_text(task)
        write_json(
            folder / f"2026_{number}_results.json",
            {"results": {task: number}, "git_hash": "x", "date": number},
        )
    out = tmp_path / "out"
    gather_columns(unfinished, ["a", "b"], out)
    names = sorted(path.name for path in out.rglob("*") if path.is_file())
    assert names == ["2026_0_results.json", "2026_0_samples_a.jsonl", "2026_1_samples_b.jsonl"]
    text = (out / "lmms" / "model" / "2026_0_results.json").read_text()
    assert json.loads(text) == {
        "results": {"a": 0, "b": 1},
        "git_hash": "x",
        "runs": {"a": {"date": 0}, "b": {"date": 1}},
    }
