"""The verdicts on the mini world, for models that are known to be better, worse or as good."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.evaluation.answering.opening import choose_adapter
from kuea_mllm.evaluation.columns import Column, ColumnKind, fingerprint_rows, score_column
from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.evaluation.results import KIND, SCHEMA_VERSION, SampleRow, write_rows
from kuea_mllm.io import write_json
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.scoring import process_exact
from kuea_mllm.miniworld.tasks import write_tasks

TASKS = ("miniworld_vqa", "miniworld_textvqa")
QUESTIONS = 200
POST_PROMPT = "\nAnswer the question using a single word or phrase."
# Noise on the weights of the vision tower, in standard deviations: what it does is known.
NOISE = {"stock": 0.0, "as good": 0.02, "blurred": 0.5}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    write_tasks(folder / "tasks", split="test", questions_per_task=QUESTIONS, seed=0)
    for name, noise in NOISE.items():
        model = folder / "models" / name
        shutil.copytree(ASSETS / "llava", model)
        add_noise(model / "model.safetensors", noise)
        write_answers(folder / name, model, folder / "tasks" / "data")
    return folder


def add_noise(path: Path, noise: float) -> None:
    weights, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "vision" in name and weight.ndim > 1:
            change = torch.randn(weight.shape, generator=generator) * weight.float().std()
            weights[name] = (weight.float() + noise * change).to(weight.dtype)
    save_file(weights, path, {"format": "pt"})


def write_answers(out: Path, model: Path, data: Path) -> None:
    runtime = choose_adapter(model, None).open_runtime(model, dtype="float32", device="cpu")
    columns = {}
    for task in TASKS:
        documents = pq.read_table(data / f"{task}.parquet").to_pylist()
        rows = []
        for start in range(0, QUESTIONS, 50):
            batch = documents[start : start + 50]
            answers = runtime.generate([request_of(item) for item in batch], max_new_tokens=8)
            for number, (item, answer) in enumerate(zip(batch, answers, strict=True), start):
                score = process_exact(item, [answer])["exact_match"]["score"]
                question, target = item["question"], item["answer"]
                rows.append(
                    SampleRow(number, item["image_id"], question, target, answer, score, False)
                )
        write_rows(out / "samples" / f"{task}.jsonl", rows)
        columns[task] = entry_of(task, rows)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "model": {"name": out.name, "adapter": "llava", "tower_fingerprint": out.name},
        "columns": columns,
        "settings": {"limit": None, "limit_seed": None},
        "versions": {},
        "created": "",
    }
    write_json(out / "summary.json", summary)


def request_of(item: dict[str, Any]) -> ChatRequest:
    picture = Image.open(io.BytesIO(item["image"]["bytes"])).convert("RGB")
    return ChatRequest(item["question"] + POST_PROMPT, (picture,))


def entry_of(task: str, rows: list[SampleRow]) -> dict[str, Any]:
    entry = {
        **vars(ColumnKind(task)),
        "task": task,
        "version": 1,
        "metric": "exact_match",
        "filter": "none",
        "split": "test",
        "higher_is_better": True,
        "scale": 1,
        "n": len(rows),
        "missing": None,
        "samples": f"samples/{task}.jsonl",
        "dataset_fingerprint": fingerprint_rows(rows),
    }
    return score_column(Column(entry, rows)).entry


@pytest.mark.parametrize(
    ("baseline", "candidate", "verdict"),
    [
        ("stock", "blurred", "worse"),
        ("blurred", "stock", "better"),
        ("stock", "as good", "cannot tell"),
    ],
)
def test_verdict_is_right(results: Path, baseline: str, candidate: str, verdict: str) -> None:
    found = compare_results(results / baseline, results / candidate, resamples=2000)
    assert {column.verdict for column in found.columns.values()} == {verdict}
    assert found.average is not None
    assert found.average.verdict == verdict
    # Nothing is decided by there being nothing to decide.
    assert all(column.answers_changed > 0 for column in found.columns.values())
    assert all(column.clusters < column.n == QUESTIONS for column in found.columns.values())
