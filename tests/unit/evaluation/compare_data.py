"""Results directories as `eval` writes them, from scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.columns import fingerprint_rows
from kuea_mllm.evaluation.results import SampleRow, write_rows
from kuea_mllm.io import write_json


def write_results(
    path: Path,
    scores: dict[str, list[float]],
    *,
    failed: tuple[int, ...] = (),
    per_image: int = 1,
    column: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    tower: str = "aaa",
) -> Path:
    columns = {}
    for task, values in scores.items():
        rows = [
            SampleRow(
                doc_id=index,
                cluster=str(index // per_image),
                question=f"question {index}",
                target="yes",
                answer=FAILED_ANSWER if index in failed else f"answer {score}",
                score=score,
                failed=index in failed,
            )
            for index, score in enumerate(values)
        ]
        write_rows(path / "samples" / f"{task}.jsonl", rows)
        columns[task] = {
            "task": task,
            "column": task,
            "suite": None,
            "protocol": "lmms-eval",
            "statistic": "mean",
            "judged": False,
            "missing": None,
            "breakdown": {},
            "split": "test",
            "version": 1.0,
            "metric": "accuracy",
            "filter": "none",
            "score": float(np.mean(values)),
            "scale": 1,
            "stderr": None,
            "higher_is_better": True,
            "n": len(rows),
            "failed": len(failed),
            "clusters": len({row.cluster for row in rows}),
            "paired": True,
            "reason": None,
            "samples": f"samples/{task}.jsonl",
            "dataset_fingerprint": fingerprint_rows(rows),
            **(column or {}),
        }
    summary = {
        "schema_version": 2,
        "kind": "results",
        "model": {"path": "m", "name": "m", "adapter": "llava", "tower_fingerprint": tower},
        "columns": columns,
        "settings": {
            "limit": None,
            "limit_seed": None,
            "dtype": "float32",
            "seed": 0,
            **(settings or {}),
        },
        "versions": {"torch": "2", "transformers": "5"},
        "created": "2026-01-01T00:00:00+00:00",
    }
    write_json(path / "summary.json", summary)
    return path


def scores_of(count: int, right: int) -> list[float]:
    return [1.0] * right + [0.0] * (count - right)


def edit_summary(path: Path, **changes: Any) -> Path:
    content = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(content | changes))
    return path


def write_rows_of(path: Path, rows: list[SampleRow], statistic: str, scale: int = 1) -> Path:
    column = {"statistic": statistic, "scale": scale, "score": 1.0}
    write_results(path, {"t": [row.score or 0.0 for row in rows]}, column=column)
    summary = json.loads((path / "summary.json").read_text())
    summary["columns"]["t"]["dataset_fingerprint"] = fingerprint_rows(rows)
    (path / "summary.json").write_text(json.dumps(summary))
    write_rows(path / "samples" / "t.jsonl", rows)
    return path


def make_row(doc_id: int, score: float, cluster: str, **more: Any) -> SampleRow:
    return SampleRow(doc_id, cluster, f"q{doc_id}", "t", f"{score}", score, failed=False, **more)
