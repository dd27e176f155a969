"""lmms-eval's own model classes in the place of ours, and judged columns, through lmms-eval.

Importing lmms-eval takes long, changes global state and warns, so this file runs itself once
(`python test_backends.py FOLDER`); the tests read what that run left behind.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Trouble, serve, text_of

from kuea_mllm.config.evaluate import JudgeSettings
from kuea_mllm.errors import KueaError
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.results import load_results
from kuea_mllm.io import read_json, write_json

SECRET = "sk-a-secret-for-the-backend-1"  # noqa: S105
COLOURS = ("red", "green", "blue", "red")
CATEGORIES = ("conv", "detail", "complex", "conv")
REFERENCES = (8.0, 10.0, 5.0, 4.0)
MODELS = (4.0, 9.0, 5.0, 3.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backends")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "BACKEND_KEY": SECRET},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def seen(world: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(world / "seen.json")
    return content


def test_backend_answers_and_lmms_eval_scores(world: Path) -> None:
    results = load_results(world / "out")
    rows = results.rows("colours")
    assert [row.answer for row in rows] == ["red", "red", "red", "red"]
    assert [row.score for row in rows] == [1.0, 0.0, 0.0, 1.0]
    assert results.columns["colours"]["score"] == 0.5
    assert results.columns["colours"]["failed"] == 0
    lines = (world / "out" / "thumbnails" / "colours.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1]


def test_backend_gets_image_prompt_and_key(seen: dict[str, Any]) -> None:
    assert seen["only key is the secret"]
    assert seen["prompts"] == ["Which colour is it?"]
    assert seen["sizes"] == [[8, 6]]


def test_simple_class_gets_model_directory_and_images(world: Path) -> None:
    rows = load_results(world / "simple").rows("colours")
    assert rows[3].answer == f"{(world / 'model').resolve()} (8, 6) Which colour is it?"


def test_record_names_backend_and_hides_the_secret(world: Path) -> None:
    summary = load_results(world / "out").summary
    model, settings = summary["model"], summary["settings"]
    assert settings["runtime"]["arguments"]["api_key"] == "$BACKEND_KEY"
    assert settings["runtime"]["class"].endswith("chat.openai.OpenAICompatible")
    assert (settings["backend"], settings["dtype"], settings["device"]) == ("openai", None, None)
    assert (model["name"], model["tower_fingerprint"]) == ("model", None)
    assert len(model["files_fingerprint"]) == 64
    assert settings["judge"]["model"] == "judge"
    for path in world.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_empty_and_missing_answers_are_failures(seen: dict[str, Any]) -> None:
    assert seen["failing"]["failed"] == 2
    answers = [row["answer"] for row in seen["failing"]["rows"]]
    assert answers == ["red", FAILED_ANSWER, FAILED_ANSWER, "red"]
    errors = [row.get("error", "") for row in seen["failing"]["rows"]]
    assert errors[1] == "the answer is empty"
    assert "Internal" in errors[2] or "500" in errors[2]


MISTAKES = {
    "unknown": ["no model class 'vlm'", "vllm"],
    "library": ["needs vllm, which is not installed"],
    "secret": ["api_key", "'$NAME'"],
    "secret by another name": ["argument headers of backend", "holds a secret"],
    "variable": ["environment has no NOT_THERE"],
    "choice": ["colours_choice", "True, False", "--protocol lmms-eval"],
    "fewshot": ["colours_shots", "demonstrations"],
    "argument": ["strict has no argument 'batchsize'", "batch_size"],
    "broken": ["strict cannot be opened: ValueError: no card"],
    "dead": ["answered none of the first 4 questions", "REQUEST_FAILED"],
    "lost": ["gave 3 answers to 4 questions"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_ends_in_one_clear_line(seen: dict[str, Any], name: str) -> None:
    for part in MISTAKES[name]:
        assert part in seen["errors"][name]
    assert SECRET not in seen["errors"][name]


def test_judged_columns_have_hand_computed_scores(world: Path) -> None:
    results = load_results(world / "out")
    ours, stock = results.columns["bench"], results.columns["llava_in_the_wild"]
    ratios = [100 * 7 / 12, 100 * 9 / 10, 100 * 5 / 5]
    assert ours["score"] == pytest.approx(sum(ratios) / 3)
    assert ours["breakdown"] == pytest.approx(
        dict(zip(("conv", "detail", "complex"), ratios, strict=True))
    )
    assert stock["score"] == pytest.approx(100 * sum(MODELS) / sum(REFERENCES))
    for entry in (ours, stock):
        assert (entry["judged"], entry["missing"], entry["failed"]) == (True, None, 0)
    assert (stock["protocol"], stock["column"]) == ("lmms-eval", "llava-wild")
    rows = results.rows("llava_in_the_wild")
    assert [(row.score, row.reference) for row in rows] == list(
        zip(MODELS, REFERENCES, strict=True)
    )
    kept = (world / "out" / "judge" / "bench.jsonl").read_text().splitlines()
    assert len(kept) == 4


def test_without_a_judge_the_column_is_missing(world: Path, seen: dict[str, Any]) -> None:
    results = load_results(world / "unjudged")
    entry = results.columns["llava_in_the_wild"]
    assert entry["score"] is None
    assert entry["missing"] == "no judge was given (--judge-url, --judge-model)"
    assert (entry["failed"], entry["paired"]) == (0, False)
    assert {row.score for row in results.rows("llava_in_the_wild")} == {None}
    assert {row.answer for row in results.rows("llava_in_the_wild")} == {"red"}


def test_judge_that_dies_leaves_the_column_to_be_resumed(seen: dict[str, Any]) -> None:
    assert "does not answer" in seen["errors"]["judge died"]
    assert seen["missing while judge was dead"] is not None
    assert seen["asked after resume"] == 4 - seen["judged before"]


def write_world(folder: Path) -> dict[str, Path]:
    from PIL import Image

    rows = []
    for number, colour in enumerate(COLOURS):
        path = folder / f"{number}.png"
        Image.new("RGB", (8, 6), colour).save(path)
        extra = {
            "question": f"Question {number}?",
            "reference_answer": f"Reference {number}.",
            "context": "A patch.",
            "category": CATEGORIES[number],
        }
        row = {"image": str(path), "image_id": str(number), "target": colour}
        rows.append({**row, "prompt": "Which colour is it?", "extra": extra})
    stock = [
        {
            "question": row["extra"]["question"],
            "gpt_answer": row["extra"]["reference_answer"],
            "caption": "A patch.",
            "category": row["extra"]["category"],
            "picture": row["image"],
        }
        for row in rows
    ]
    for name, content in (("rows", rows), ("stock", stock)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "scoring.py").write_text(
        "def process(doc, results):\n"
        "    score = float(results[0] == doc['target'])\n"
        "    return {'accuracy': {'score': score, 'image_id': doc['image_id']}}\n"
        "def mean(items):\n"
        "    return sum(item['score'] for item in items) / len(items)\n"
        "def picture(doc):\n"
        "    from PIL import Image\n"
        "    return [Image.open(doc['picture']).convert('RGB')]\n"
    )
    (folder / "strict_backend.py").write_text(
        "from lmms_eval.api.model import lmms\n"
        "class Strict(lmms):\n"
        "    is_simple = True\n"
        "    def __init__(self, pretrained, batch_size=1, lose=0, card=True):\n"
        "        super().__init__()\n"
        "        if not card:\n"
        "            raise ValueError('no card')\n"
        "        self.pretrained, self.batch_size, self.lose = pretrained, batch_size, lose\n"
        "    def generate_until(self, requests):\n"
        "        context, settings, pictures, doc_id, task, split = requests[0].args\n"
        "        size = pictures(self.task_dict[task][split][doc_id])[0].size\n"
        "        return [f'{self.pretrained} {size} {context}' for _ in requests][self.lose:]\n"
        "    loglikelihood = generate_until_multi_round = generate_until\n"
    )
    import lmms_eval

    wild = Path(lmms_eval.__file__).parent / "tasks/llava-in-the-wild/llava-in-the-wild.yaml"
    data = "dataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: %s.jsonl}}\n"
    plain = (
        "task: %s\n" + data % "rows" + "output_type: generate_until\n"
        "doc_to_visual: !function kuea_mllm.evaluation.suites.documents.to_visual\n"
        "doc_to_text: !function kuea_mllm.evaluation.suites.documents.to_text\n"
        "doc_to_target: target\n"
        "process_results: !function scoring.process\n"
        "metric_list: [{metric: accuracy, aggregation: !function scoring.mean, "
        "higher_is_better: true}]\n"
        "generation_kwargs: {max_new_tokens: 8, do_sample: false%s}\n"
        "metadata: {version: 1.0%s}\n"
    )
    kuea = (
        ", kuea: {suite: llava-paper, protocol: paper, column: llava-wild, "
        "statistic: mean_of_group_ratios, judged: true}"
    )
    contents = {
        "colours": plain % ("colours", "", ""),
        "colours_choice": plain % ("colours_choice", ", candidates: ['True', 'False']", ""),
        "colours_shots": plain % ("colours_shots", ", completes: true", ""),
        "bench": plain % ("bench", "", kuea),
        "llava_in_the_wild": f"include: {wild}\ntask: llava_in_the_wild\n"
        + data % "stock"
        + "doc_to_visual: !function scoring.picture\n",
    }
    for name, text in contents.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: folder / f"{name}.yaml" for name in contents}


def say_verdict(request: dict[str, Any]) -> str:
    text = text_of(request)
    number = next((n for n in range(4) if f"Question {n}?" in text), 0)
    return f"{REFERENCES[number]:g} {MODELS[number]:g}\nSo it is."


class Bench:
    """All that is done with one set of tasks."""

    def __init__(self, folder: Path, server: ChatServer) -> None:
        self.folder = folder
        self.server = server
        self.files = write_world(folder)
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")

    def tasks(self, names: Sequence[str]) -> dict[str, Any]:
        from kuea_mllm.evaluation.lmms.loading import load_tasks
        from kuea_mllm.evaluation.tasks import TaskSelection

        return load_tasks(TaskSelection({name: self.files[name] for name in names}, ()))

    def run(
        self,
        out: str,
        names: Sequence[str],
        judge: JudgeSettings | None = None,
        *,
        backend: str = "openai",
        resume: bool = False,
        **arguments: str,
    ) -> None:
        """Evaluate; a backend `openai` finds its server and its key."""
        from kuea_mllm.evaluation.runner import evaluate

        if backend == "openai":
            arguments = {"base_url": self.server.url, "api_key": "$BACKEND_KEY"} | arguments
            arguments["max_retries"] = "1"
        evaluate(
            self.model,
            [str(self.files[name]) for name in names],
            self.folder / out,
            backend=backend,
            backend_args=arguments,
            judge=judge,
            batch_size=4,
            max_failures=2,
            thumbnails=2,
            show_progress=False,
            recipe=f"backend_args: {arguments}",
            resume=resume,
        )

    def strict(self, out: str, **arguments: str) -> None:
        """Run a class that takes no arguments but its own, and is of the simple kind."""
        from lmms_eval.models import MODEL_REGISTRY_V2
        from lmms_eval.models.registry_v2 import ModelManifest

        if str(self.folder) not in sys.path:
            sys.path.append(str(self.folder))
        manifest = ModelManifest("strict", simple_class_path="strict_backend.Strict")
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
        self.run(out, ["colours"], backend="strict", **arguments)


def run_everything(folder: Path) -> dict[str, Any]:
    import gc

    import torch

    from kuea_mllm.evaluation.lmms.loguru_bridge import import_lmms_eval

    import_lmms_eval()
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import wait_none

    from kuea_mllm.evaluation.judging import client

    gc.freeze()
    torch.set_num_threads(1)
    ConfigurableTask.download.retry.wait = wait_none()
    ConfigurableTask.process_results.retry.wait = wait_none()
    client.FIRST_PAUSE_S = 0.0
    with serve(lambda request: "red") as server, serve(say_verdict) as judge_server:
        bench = Bench(folder, server)
        judge = JudgeSettings(url=judge_server.url, model="judge", retries=0, concurrency=1)
        bench.run("out", ["colours", "bench", "llava_in_the_wild"], judge)
        requests = list(server.requests)
        bench.run("unjudged", ["llava_in_the_wild"])
        bench.strict("simple")
        seen = {
            "only key is the secret": set(server.keys) == {f"Bearer {SECRET}"},
            "prompts": sorted({text_of(request) for request in requests[:4]}),
            "sizes": [list(size) for size in {image_size(request) for request in requests}],
            "failing": run_failing(bench),
        }
        seen |= run_dying(bench, judge, judge_server)
        seen["errors"] |= collect_mistakes(bench)
    return seen


def image_size(request: dict[str, Any]) -> tuple[int, int]:
    from PIL import Image

    parts = request["messages"][-1]["content"]
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return image.size


def pixel(request: dict[str, Any]) -> tuple[int, ...]:
    from PIL import Image

    parts = request["messages"][-1]["content"]
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return tuple(image.convert("RGB").getpixel((0, 0)))  # type: ignore[arg-type]


def run_failing(bench: Bench) -> dict[str, Any]:
    def say(request: dict[str, Any]) -> str | Trouble:
        # Green pictures get nothing, blue ones an error.
        return {(0, 128, 0): " \n", (0, 0, 255): Trouble(500)}.get(pixel(request), "red")

    before, bench.server.say = bench.server.say, say
    bench.run("failing", ["colours"])
    bench.server.say = before
    results = load_results(bench.folder / "failing")
    rows = [row.to_json() for row in results.rows("colours")]
    return {"failed": results.columns["colours"]["failed"], "rows": rows}


def run_dying(bench: Bench, judge: JudgeSettings, server: ChatServer) -> dict[str, Any]:
    from kuea_mllm.evaluation.unfinished import COLUMN, unfinished_path

    replies = iter(["yes", say_verdict, say_verdict])
    server.say = lambda request: (
        reply(request) if callable(reply := next(replies, Trouble(0))) else reply
    )
    error = message_of(lambda: bench.run("died", ["bench"], judge))
    path = unfinished_path(bench.folder / "died")
    judged = len((path / "judge" / "bench.jsonl").read_text().splitlines())
    missing = read_json(path / "columns" / "bench" / COLUMN)["entry"]["missing"]
    server.say = say_verdict
    server.requests.clear()
    asked = len(bench.server.requests)
    bench.run("died", ["bench"], judge, resume=True)
    assert len(bench.server.requests) == asked
    return {
        "errors": {"judge died": error},
        "judged before": judged,
        "missing while judge was dead": missing,
        "asked after resume": len(server.requests),
    }


def collect_mistakes(bench: Bench) -> dict[str, str]:
    def run(names: Sequence[str] = ("colours",), **options: Any) -> str:
        return message_of(lambda: bench.run("never", names, **options))

    asked = len(bench.server.requests)
    errors = {
        "unknown": run(backend="vlm"),
        "library": run(backend="vllm"),
        "secret": run(api_key=SECRET),
        "secret by another name": run(headers=f"Bearer {SECRET}"),
        "variable": run(api_key="$NOT_THERE"),
        "choice": run(["colours", "colours_choice"]),
        "fewshot": run(["colours_shots"]),
        "argument": message_of(lambda: bench.strict("never", batchsize="2")),
        "broken": message_of(lambda: bench.strict("never", card="false")),
        "lost": message_of(lambda: bench.strict("never", lose="1")),
    }
    assert len(bench.server.requests) == asked
    bench.server.say = lambda request: Trouble(500)
    return {**errors, "dead": run()}


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except KueaError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    write_json(Path(sys.argv[1]) / "seen.json", run_everything(Path(sys.argv[1])))
