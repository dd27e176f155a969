"""`kuea-mllm eval --num-processes`: the answers of one process, one voice, nothing asked twice."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from pyarrow import parquet

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.evaluation.results import load_results
from kuea_mllm.miniworld import models, vocabularies
from kuea_mllm.miniworld.tasks import write_tasks

QUESTIONS = 24
TASKS = ("miniworld_pope", "miniworld_vqa")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny LLaVA whose answers depend on the image, and two tasks."""
    folder = tmp_path_factory.mktemp("processes")
    write_tasks(folder / "tasks", split="test", questions_per_task=QUESTIONS, seed=0)
    torch.manual_seed(0)
    tokenizer = vocabularies.build_llava_tokenizer()
    model = models.make_llava(models.make_clip(vocabularies.build_clip_tokenizer()), tokenizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    model.save_pretrained(folder / "model")
    models.make_llava_processor(tokenizer).save_pretrained(folder / "model")
    return folder


def start(world, out, *options):
    tasks = ",".join(str(world / "tasks" / f"{task}.yaml") for task in TASKS)
    command = ["eval", f"--model={world / 'model'}", f"--tasks={tasks}", f"--out={out}"]
    return subprocess.Popen(
        [sys.executable, "-m", "kuea_mllm", *command, "--device=cpu", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers_of_one_process(world, task):
    """Ask the model without lmms-eval, everything about each question by itself."""
    runtime = LlavaAdapter().open_runtime(world / "model", dtype="float32", device="cpu")
    path = world / "tasks" / "data" / f"{task}.parquet"
    with path.open("rb") as file:
        rows = parquet.read_table(file).to_pylist()
    answers = []
    for number, row in enumerate(rows):
        question = f"{row['question']}\nAnswer the question using a single word or phrase."
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            request = ChatRequest(question, (image.convert("RGB"),))
        [answer] = runtime.generate([request], max_new_tokens=8)
        answers.append((number, question, answer.split("\n\n")[0]))
    return answers


def process_of_rank(parent, rank):
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process has rank {rank}")


def test_killed_process_ends_all_and_two_go_on_to_the_answers_of_one(world, tmp_path):
    out = tmp_path / "two"
    process = start(world, out, "--num-processes=2", "--batch-size=1")
    answers = tmp_path / "two.unfinished" / "answers" / TASKS[0] / "1.jsonl"
    end = time.monotonic() + 240
    while not answers.exists() or len(answers.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("error: ") == 1
    assert "process 1 was killed by SIGKILL" in err
    assert "Go on with: kuea-mllm eval" in err
    assert not out.exists()

    resumed = start(world, out, "--num-processes=2", "--batch-size=4", "--resume")
    printed, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert printed.count("results: ") == 1
    assert f" of {QUESTIONS}." in err.split("Answers of an earlier sitting")[1]
    results = load_results(out)
    for task in TASKS:
        found = [(row.doc_id, row.question, row.answer) for row in results.rows(task)]
        assert found == answers_of_one_process(world, task)
        assert len({answer for _, _, answer in found}) > 8
        pictures = (out / "thumbnails" / f"{task}.jsonl").read_text().splitlines()
        # Also of what the killed run and the other process have answered.
        assert len({json.loads(line)["doc_id"] for line in pictures}) == QUESTIONS
    assert json.loads((out / "summary.json").read_text())["settings"]["processes"] == 2
    assert not (tmp_path / "two.unfinished").exists()


def test_num_processes_under_torchrun_is_refused(kuea, world, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    tasks = world / "tasks" / f"{TASKS[0]}.yaml"
    answer = kuea(
        *("eval", f"--model={world / 'model'}", f"--tasks={tasks}", f"--out={tmp_path / 'out'}"),
        "--num-processes=2",
    )
    assert answer.code == 2
    assert "torchrun" in answer.err
