"""A comparison with one column of each kind, and what belongs to it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from kuea_mllm.reporting.blocks import Example


def make_column(task: str, metric: str = "exact_match", **changes: Any) -> dict[str, Any]:
    column: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "version": 1,
        "higher_is_better": True,
        "scale": 1,
        "paired": True,
        "reason": None,
        "baseline": 0.412,
        "candidate": 0.446,
        "difference": 0.034,
        "low": 0.012,
        "high": 0.056,
        "p_value": 0.001,
        "p_holm": 0.004,
        "test": "mcnemar",
        "verdict": "better",
        "detectable": 0.031,
        "n": 800,
        "clusters": 200,
        "dropped": [],
        "answers_changed": 100,
        "improved": {"count": 71, "doc_ids": []},
        "worsened": {"count": 44, "doc_ids": []},
        "note": None,
    }
    return column | changes


NULL: dict[str, Any] = {
    "baseline": 0.531,
    "candidate": 0.524,
    "difference": -0.007,
    "low": -0.031,
    "high": 0.017,
    "p_holm": 0.61,
    "verdict": "cannot tell",
}
WORSE: dict[str, Any] = {
    "baseline": 86.1,
    "candidate": 83.5,
    "difference": -2.6,
    "low": -4.1,
    "high": -1.1,
    "p_holm": 0.0004,
    "verdict": "worse",
    "detectable": 2.0,
    "scale": 100,
}
UNPAIRED: dict[str, Any] = {
    "baseline": 1481.2,
    "candidate": 1495.9,
    "difference": 14.7,
    "low": None,
    "high": None,
    "p_value": None,
    "p_holm": None,
    "verdict": "cannot tell",
    "detectable": None,
    "paired": False,
    "reason": "the metric is a total over groups.",
}
AVERAGE: dict[str, Any] = {
    "columns": ["a", "b"],
    "excluded": {},
    "baseline": 0.5,
    "candidate": 0.503,
    "difference": 0.003,
    "low": -0.006,
    "high": 0.012,
    "p_value": 0.44,
    "verdict": "cannot tell",
    "note": None,
}


def make_comparison(*columns: dict[str, Any], **changes: Any) -> dict[str, Any]:
    comparison: dict[str, Any] = {
        "schema_version": 1,
        "kind": "comparison",
        "baseline": {"path": "/r/a", "model": {"name": "llava-stock"}, "created": ""},
        "candidate": {"path": "/r/b", "model": {"name": "llava-kuea"}, "created": ""},
        "settings": {"resamples": 1000, "seed": 0, "level": 0.95, "alpha": 0.05, "limit": None},
        "columns": {column["task"]: column for column in columns},
        "average": AVERAGE,
        "only_in": {"baseline": [], "candidate": []},
        "warnings": [],
    }
    return comparison | changes


def full_comparison() -> dict[str, Any]:
    return make_comparison(
        make_column("miniworld_textvqa"),
        make_column("miniworld_spatial", **NULL),
        make_column("pope", "f1", n=9000, **WORSE),
        make_column("mme", "mme_perception_score", n=2374, **UNPAIRED),
    )


def make_summary(name: str = "llava-stock") -> dict[str, Any]:
    column = {
        "task": "miniworld_textvqa",
        "metric": "exact_match",
        "score": 0.412,
        "scale": 1,
        "stderr": 0.0123,
        "n": 12800,
        "failed": 2,
    }
    return {
        "schema_version": 1,
        "kind": "results",
        "model": {"path": f"/m/{name}", "name": name, "tower": {"teacher": "dinov2"}},
        "columns": {column["task"]: column},
        "settings": {"batch_size": 8, "limit": None},
        "versions": {"torch": "2.9.1"},
        "created": "2026-01-01T00:00:00+00:00",
        "command": "kuea-mllm eval",
        "seconds": 12.5,
    }


def make_png(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_example(**changes: Any) -> Example:
    fields: dict[str, Any] = {
        "task": "miniworld_textvqa",
        "doc_id": "7",
        "question": "What is written?",
        "expected": "KUEA",
        "baseline_answer": "KUFA",
        "candidate_answer": "KUEA",
        "baseline_score": 0.0,
        "candidate_score": 1.0,
        "image": make_png(32),
    }
    return Example(**(fields | changes))


def make_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(0, 100, 10):
        scale = 0.9**step
        rows.append(
            {
                "step": step,
                "loss": 0.5 * scale + 0.001,
                "loss_kernel": 0.4 * scale + 0.001,
                "loss_preserve": 0.01,
                "lr": 1e-5,
                "kernel_gamma": 1 + step / 100,
                "kernel_coef0": 0.001,
            }
        )
    for step in (0, 50, 100):
        rows.append(
            {
                "step": step,
                "heldout_kernel_gap": 0.1,
                "heldout_kernel_gap_original": 0.1,
                "heldout_drift_cosine_mean": 0.99,
            }
        )
    return rows
