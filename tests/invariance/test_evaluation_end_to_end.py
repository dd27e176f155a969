"""The whole way through lmms-eval, in one process of its own.

Importing lmms-eval takes long, changes global state and warns, so this file runs itself once
(`python test_evaluation_end_to_end.py FOLDER`); the tests read what that run left behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.errors import KueaError
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.evaluation.results import load_results
from kuea_mllm.io import read_json, write_json

QUESTIONS = 10
TASKS = ["miniworld_pope", "miniworld_vqa", "miniworld_textvqa", "miniworld_refcoco"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def errors(world: Path) -> dict[str, str]:
    content: dict[str, str] = read_json(world / "errors.json")
    return content


def test_batch_of_eight_gives_the_answers_of_batch_one(world: Path) -> None:
    one, eight = load_results(world / "batch-1"), load_results(world / "batch-8")
    for task in TASKS:
        assert one.rows(task) == eight.rows(task)
    answers = [row.answer for task in TASKS for row in one.rows(task)]
    assert len(set(answers)) > 1


def test_results_directory_is_complete(world: Path) -> None:
    results = load_results(world / "batch-8")
    assert sorted(results.columns) == sorted(TASKS)
    pope = results.columns["miniworld_pope"]
    assert pope["metric"] == "accuracy"
    assert pope["version"] == 1.0
    assert pope["paired"]
    assert pope["n"] == QUESTIONS
    assert pope["clusters"] < QUESTIONS
    rows = results.rows("miniworld_pope")
    assert [row.doc_id for row in rows] == list(range(QUESTIONS))
    assert pope["score"] == pytest.approx(sum(row.score or 0.0 for row in rows) / QUESTIONS)
    assert {row.target for row in rows} == {"yes", "no"}
    assert rows[0].question.endswith("single word or phrase.")
    index = (results.path / "thumbnails" / "miniworld_pope.jsonl").read_text().splitlines()
    pictures = {entry["doc_id"]: entry["picture"] for entry in map(json.loads, index)}
    assert sorted(pictures) == [0, 1, 2]
    assert {path.name for path in (results.path / "thumbnails" / "pictures").iterdir()} >= set(
        pictures.values()
    )
    written = [path.name for path in (results.path / "lmms").rglob("*") if path.is_file()]
    assert len(written) == 1 + len(TASKS)
    assert (results.path / "run.yaml").read_text() == "kind: eval\n"
    assert (results.path / "lmms_eval.log").stat().st_size > 0


def test_summary_names_model_settings_and_versions(world: Path) -> None:
    summary = load_results(world / "batch-8").summary
    assert summary["model"]["path"].endswith("a,b=c")
    assert summary["model"]["adapter"] == "llava"
    assert len(summary["model"]["tower_fingerprint"]) == 64
    assert summary["settings"]["dtype"] == "float32"
    assert summary["settings"]["limit"] == QUESTIONS
    assert summary["versions"]["lmms_eval"] == "0.7.3"


def test_two_runs_of_one_model_cannot_be_told_apart(world: Path) -> None:
    comparison = compare_results(world / "batch-1", world / "batch-8", resamples=200)
    assert {column.verdict for column in comparison.columns.values()} == {"cannot tell"}
    assert {column.answers_changed for column in comparison.columns.values()} == {0}
    json.dumps(comparison.to_json(), allow_nan=False)


def test_failures_are_written_marked_and_reported(world: Path, errors: dict[str, str]) -> None:
    assert "3 questions got no answer (allowed: 2)" in errors["failures"]
    assert "document 2 of miniworld_pope: ValueError: I refuse" in errors["failures"]
    rows = load_results(world / "failing").rows("miniworld_pope")
    assert [row.doc_id for row in rows if row.failed] == [2, 5, 7]
    assert rows[2].answer == FAILED_ANSWER
    assert rows[2].error == "ValueError: I refuse"
    assert rows[3].answer == "yes"
    comparison = compare_results(world / "failing", world / "tolerant", resamples=200)
    assert comparison.columns["miniworld_pope"].dropped == (2, 5, 7)


def test_mistakes_end_in_one_clear_line(errors: dict[str, str]) -> None:
    assert "no vision tower 00" not in errors["tower"]
    assert "holds vision tower" in errors["tower"]
    assert "not 00" in errors["tower"]
    assert "Nearest names: " in errors["unknown"]
    assert "pope" in errors["unknown"]
    assert "loading data set parquet" in errors["damaged"]
    assert "damaged.parquet'} failed: " in errors["damaged"]
    assert "RetryError" not in errors["damaged"]
    assert "unexpected keyword argument 'metrics'" in errors["misspelt"]
    assert "multiple_choice" in errors["kind"]
    assert "loglikelihood" in errors["likelihood"]
    assert "temperatur" in errors["argument"]
    assert "scoring is broken" in errors["scoring"]
    assert "exists already" in errors["exists"]
    assert "its kuea.json records ffff (float32)" in errors["changed"]


class FakeAdapter:
    """Says "yes" to everything, except to some questions."""

    name = "fake"

    def __init__(self, refused: Sequence[str] = ()) -> None:
        self.refused = refused

    def check_base(self, base: Path) -> None:
        pass

    def tower_slot(self, base: Path) -> TowerSlot:
        return TowerSlot({}, "tower", None, "clip")

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> FakeAdapter:
        return self

    def generate(self, requests: Sequence[Any], **options: Any) -> list[str]:
        if any(request.prompt in self.refused for request in requests):
            raise ValueError("I refuse")
        return ["yes\n\nand more"] * len(requests)

    def describe(self) -> dict[str, Any]:
        return {"dtype": "float32"}

    def vision_state(self) -> Mapping[str, Any]:
        import torch

        return {"encoder.layers.0.weight": torch.zeros(2)}


def build_model(folder: Path) -> None:
    import torch

    from kuea_mllm.miniworld import models, vocabularies

    torch.manual_seed(0)
    tokenizer = vocabularies.build_llava_tokenizer()
    clip = models.make_clip(vocabularies.build_clip_tokenizer())
    model: Any = models.make_llava(clip, tokenizer)
    # Larger weights than the initial ones, so that the answers depend on the image.
    for weight in model.parameters():
        weight.data.mul_(3.0)
    model.save_pretrained(folder)
    models.make_llava_processor(tokenizer).save_pretrained(folder)


def run_everything(folder: Path) -> dict[str, str]:
    import gc

    import torch
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import wait_none

    from kuea_mllm.evaluation import runner
    from kuea_mllm.miniworld.tasks import write_tasks

    # lmms-eval collects garbage twice after each task, and all libraries are there to be looked at.
    gc.freeze()
    torch.set_num_threads(1)
    # lmms-eval waits two seconds before each of its four retries.
    ConfigurableTask.download.retry.wait = wait_none()
    ConfigurableTask.process_results.retry.wait = wait_none()
    tasks, model = folder / "tasks", folder / "a,b=c"
    write_tasks(tasks, split="test", questions_per_task=QUESTIONS + 2, seed=0)
    build_model(model)
    options: dict[str, Any] = {
        "device": "cpu",
        "show_progress": False,
        "thumbnails": 3,
        "recipe": "kind: eval\n",
    }
    for batch_size in (8, 1):
        runner.evaluate(
            model,
            [str(tasks)],
            folder / f"batch-{batch_size}",
            batch_size=batch_size,
            limit=QUESTIONS,
            **options,
        )
    errors = collect_mistakes(folder, model, options)
    write_json(model / "kuea.json", {"tower": {"fingerprints": {"float32": "ffff"}}})
    errors["changed"] = message_of(
        lambda: runner.evaluate(model, [str(tasks)], folder / "other", **options)
    )
    (model / "kuea.json").unlink()
    pope = str(tasks / "miniworld_pope.yaml")
    rows = load_results(folder / "batch-8").rows("miniworld_pope")
    with_adapter(FakeAdapter([rows[i].question for i in (2, 5, 7)]))
    options |= {"limit": QUESTIONS}
    errors["failures"] = message_of(
        lambda: runner.evaluate(model, [pope], folder / "failing", max_failures=2, **options)
    )
    runner.evaluate(model, [pope], folder / "tolerant", max_failures=3, **options)
    return errors


def with_adapter(adapter: FakeAdapter) -> None:
    from kuea_mllm.evaluation import runner

    vars(runner)["choose_adapter"] = lambda model_dir, name: adapter


def collect_mistakes(folder: Path, model: Path, options: dict[str, Any]) -> dict[str, str]:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    from kuea_mllm.evaluation import runner

    make: Any = get_model("kuea_mllm")
    request = Instance(
        "loglikelihood", ("", ""), 0, metadata={"task": "t", "doc_id": 0, "repeats": 1}
    )

    def score(tasks: str, out: str = "never") -> Callable[[], Any]:
        # What fails while it is scored keeps its answers.
        return lambda: runner.evaluate(model, [tasks], folder / out, restart=True, **options)

    pope = (folder / "tasks" / "miniworld_pope.yaml").read_text()
    changes = {
        "misspelt": ("metric_list:", "metrics: []\nmetric_list:"),
        "kind": ("output_type: generate_until", "output_type: multiple_choice\ndoc_to_choice: [a]"),
        "damaged": ("miniworld_pope.parquet", "damaged.parquet"),
        "scoring": ("kuea_mllm.miniworld.scoring.process_pope", "broken.process"),
    }
    (folder / "broken.py").write_text(
        "def process(doc, results): raise KeyError('scoring is broken')"
    )
    (folder / "data").symlink_to(folder / "tasks" / "data")
    (folder / "data" / "damaged.parquet").write_bytes(b"PAR1 nothing")
    errors = {}
    for name, (old, new) in changes.items():
        path = folder / f"{name}.yaml"
        text = pope.replace(old, new)
        if name == "kind":
            head, _, tail = text.partition("generation_kwargs:")
            text = head + tail[tail.index("lmms_eval_specific_kwargs:") :]
        path.write_text(text)
        errors[name] = message_of(score(str(path)))
    return errors | {
        "tower": message_of(lambda: make(model=str(model), device="cpu", tower="fp:00")),
        "unknown": message_of(score("popee")),
        "likelihood": message_of(
            lambda: make(model=str(model), device="cpu").loglikelihood([request])
        ),
        "argument": message_of(lambda: make(model=str(model), temperatur=1)),
        "exists": message_of(score("pope", "batch-1")),
    }


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (KueaError, TypeError) as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    write_json(Path(sys.argv[1]) / "errors.json", run_everything(Path(sys.argv[1])))
