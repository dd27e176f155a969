"""`kuea-mllm judge`: scores for answers that are there already."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "evaluation"))

from chat_server import ChatServer, Trouble, serve, text_of

from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.judging import client
from kuea_mllm.evaluation.judging.column import write_documents
from kuea_mllm.evaluation.judging.finished import documents_path
from kuea_mllm.evaluation.judging.prompts import JudgedDocument
from kuea_mllm.evaluation.results import SCHEMA_VERSION, SampleRow, load_results, write_rows
from kuea_mllm.io import write_json

TASK = "kuea_paper_llava_wild"
ANSWERS = ("A cat.", "A <b>dog</b>.", "10 10")
KEY = "sk-of-the-command-line-99"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serve(lambda request: "8 6\nBecause.") as running:
        yield running


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results")


def write_results(folder: Path, answers: tuple[str, ...] = ANSWERS) -> Path:
    rows = [
        SampleRow(n, str(n), f"Q{n}?", f"R{n}.", answer, None, answer == FAILED_ANSWER)
        for n, answer in enumerate(answers)
    ]
    write_rows(folder / "samples" / f"{TASK}.jsonl", rows)
    documents = [
        JudgedDocument(n, f"Q{n}?", f"R{n}.", "Words.", "conv", "llava_bench_conv")
        for n in range(len(answers))
    ]
    write_documents(documents_path(folder, TASK), documents)
    reason = "no judge was given (--judge-url, --judge-model)"
    entry = {
        "task": TASK,
        "column": "llava-wild",
        "suite": "llava-paper",
        "protocol": "paper",
        "statistic": "ratio_of_sums",
        "judged": True,
        "version": 1.0,
        "metric": "judged",
        "filter": "none",
        "split": "test",
        "score": None,
        "scale": 100,
        "stderr": None,
        "higher_is_better": True,
        "n": len(rows),
        "failed": sum(row.failed for row in rows),
        "clusters": len(rows),
        "paired": False,
        "reason": reason,
        "missing": reason,
        "breakdown": {},
        "samples": f"samples/{TASK}.jsonl",
        "dataset_fingerprint": "0",
    }
    model = {"path": "m", "name": "m", "adapter": "llava", "tower_fingerprint": "0", "tower": None}
    summary = {
        "kind": "results",
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "columns": {TASK: entry},
        "settings": {"judge": None, "limit": None},
        "versions": {},
        "created": "2026-01-01T00:00:00Z",
        "command": None,
        "seconds": 1.0,
    }
    write_json(folder / "summary.json", summary)
    return folder


def call(kuea: Any, results: Path, server: ChatServer, out: str, *options: str) -> Any:
    return kuea(
        "judge", results, f"--judge-url={server.url}", "--judge-model=judge-1",
        f"--out={results.parent / out}", "--retries=0", *options,
    )  # fmt: skip


def test_missing_column_is_filled_in_new_results(
    kuea: Any, results: Path, server: ChatServer
) -> None:
    answer = call(kuea, results, server, "out", "--json")
    assert answer.code == 0, answer.err
    summary = json.loads(answer.out)
    assert summary == json.loads((results.parent / "out" / "summary.json").read_text())
    entry = summary["columns"][TASK]
    assert (entry["score"], entry["missing"], entry["failed"]) == (75.0, None, 0)
    assert entry["breakdown"] == {"conv": 75.0}
    judge = summary["settings"]["judge"]
    assert (judge["url"], judge["model"]) == (server.url, "judge-1")
    assert len(judge["prompt"]["sha256"]) == 64
    rows = load_results(results.parent / "out").rows(TASK)
    assert [(row.score, row.reference, row.group) for row in rows] == [(6.0, 8.0, "conv")] * 3
    assert [row.answer for row in rows] == list(ANSWERS)
    assert load_results(results).columns[TASK]["score"] is None
    assert not (results.parent / "out.verdicts").exists()
    assert server.keys[-1] == f"Bearer {KEY}"
    for path in results.parent.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text()


def test_table_shows_the_score(kuea: Any, results: Path, server: ChatServer) -> None:
    answer = call(kuea, results, server, "out")
    assert answer.code == 0, answer.err
    assert "75.0" in answer.out


def test_judge_that_dies_is_asked_again_for_the_rest(
    kuea: Any, results: Path, server: ChatServer
) -> None:
    server.say = lambda request: Trouble(0) if "10 10" in text_of(request) else "8 6"
    answer = call(kuea, results, server, "out", "--concurrency=1")
    assert answer.code == 1
    assert "it judged 2 of 3 answers" in answer.err
    assert KEY not in answer.err
    assert not (results.parent / "out").exists()
    server.say = lambda request: "8 6"
    server.requests.clear()
    assert call(kuea, results, server, "out").code == 0
    assert ["10 10" in text_of(request) for request in server.requests] == [True]


def test_nonsense_is_counted_and_never_scored(
    kuea: Any, tmp_path: Path, server: ChatServer
) -> None:
    results = write_results(tmp_path / "r", ("A cat.", FAILED_ANSWER, "A dog."))
    server.say = lambda request: "Lovely!" if "A dog" in text_of(request) else "8 6"
    answer = call(kuea, results, server, "out")
    assert answer.code == 1
    assert "2 answers got no verdict (allowed: 0), the first one is document 1" in answer.err
    entry = load_results(tmp_path / "out").columns[TASK]
    assert (entry["score"], entry["failed"]) == (75.0, 2)
    assert call(kuea, results, server, "tolerant", "--max-failures=2").code == 0
    # What it wrote can be filled up, or judged anew by another model.
    server.say = lambda request: "8 6"
    server.requests.clear()
    assert call(kuea, tmp_path / "out", server, "full", "--max-failures=1").code == 0
    assert len(server.requests) == 1
    entry = load_results(tmp_path / "full").columns[TASK]
    assert (entry["score"], entry["failed"]) == (75.0, 1)
    full = call(kuea, tmp_path / "full", server, "never")
    assert full.code == 2
    assert "on every answer already" in full.err
    server.requests.clear()
    other = call(
        kuea, tmp_path / "full", server, "other", "--judge-model=judge-2", "--max-failures=1"
    )
    assert other.code == 0, other.err
    assert len(server.requests) == 2


def test_nothing_to_judge_is_said(kuea: Any, results: Path, server: ChatServer) -> None:
    summary = json.loads((results / "summary.json").read_text())
    summary["columns"][TASK]["judged"] = False
    write_json(results / "summary.json", summary)
    answer = call(kuea, results, server, "out")
    assert answer.code == 2
    assert "hold no column that a judge scores" in answer.err
    assert server.keys == []


def test_judge_that_is_not_there_writes_nothing(kuea: Any, results: Path) -> None:
    with serve(lambda request: "yes") as gone:
        pass
    answer = call(kuea, results, gone, "out")
    assert answer.code == 1
    assert f"judge {gone.url} (model judge-1) does not answer: no connection" in answer.err
    assert [path.name for path in results.parent.iterdir()] == ["results"]


def test_output_that_exists_is_refused_before_anything_is_asked(
    kuea: Any, results: Path, server: ChatServer
) -> None:
    answer = call(kuea, results, server, "results")
    assert answer.code == 2
    assert "exists already" in answer.err
    assert server.keys == []


def test_new_results_hold_no_report_of_the_old_scores(
    kuea: Any, results: Path, server: ChatServer
) -> None:
    (results / "report.html").write_text("missing")
    server.say = lambda request: Trouble(400) if "10 10" in text_of(request) else "8 6"
    assert call(kuea, results, server, "out").code == 1
    assert (results.parent / "out" / "summary.json").is_file()
    assert not (results.parent / "out" / "report.html").exists()


def test_files_of_others_beside_the_verdicts_stay(
    kuea: Any, results: Path, server: ChatServer
) -> None:
    notes = results.parent / "out.verdicts" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    assert call(kuea, results, server, "out").code == 0
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


def test_key_in_the_place_of_its_variable_is_refused_unseen(
    kuea: Any, results: Path, server: ChatServer
) -> None:
    answer = call(kuea, results, server, "out", "--judge-key=sk-it-is-a-key-1234567890")
    assert answer.code == 2
    assert "api_key_env is the name of an environment variable" in answer.err
    assert "sk-it" not in answer.err and server.keys == []
