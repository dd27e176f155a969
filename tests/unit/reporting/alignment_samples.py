"""A run directory as `align` leaves it, without having trained anything."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

BEFORE = {
    "heldout_kernel_gap": 0.05,
    "heldout_kernel_gap_original": 0.05,
    "heldout_cka_teacher": 0.48,
    "heldout_drift_distance_mean": 0.0,
    "heldout_drift_distance_max": 0.0,
    "heldout_drift_cosine_mean": 1.0,
    "heldout_drift_bound_mean": 0.0,
    "heldout_drift_bound_max": 0.0,
    "heldout_patch_drift": 0.0,
    "heldout_zero_shot": 0.6,
}
AFTER = {
    "heldout_kernel_gap": 0.01,
    "heldout_kernel_gap_original": 0.04,
    "heldout_cka_teacher": 0.5,
    "heldout_drift_distance_mean": 1.5,
    "heldout_drift_distance_max": 3.0,
    "heldout_drift_cosine_mean": 0.93,
    "heldout_drift_bound_mean": 0.6,
    "heldout_drift_bound_max": 1.2,
    "heldout_patch_drift": 0.04,
    "heldout_zero_shot": 0.61,
}
POLYNOMIAL = {"type": "polynomial", "gamma": 1.0, "coef0": 1.0, "degree": 3, "trainable": True}
MANIFEST: dict[str, Any] = {
    "base_tower": {"reference": "some/clip", "fingerprint": "aaa"},
    "teacher": {
        "reference": "some/dino",
        "fingerprint": "ttt",
        "readout": "cls",
        "image_size": 224,
    },
    "objective": {
        "kernel_weight": 0.5,
        "preserve_weight": 1.0,
        "cka_weight": 0.0,
        "student_kernel": POLYNOMIAL,
        "teacher_kernel": {**POLYNOMIAL, "trainable": False},
    },
    "compat": "paper",
    "optim": {
        "lr": 1e-5,
        "weight_decay": 1e-4,
        "batch_size": 64,
        "steps": 20,
        "warmup_steps": 1,
    },
    "runtime": {"seed": 3, "device": "cpu", "precision": "fp32"},
    "data": {"images": "some/images", "trained_on": 12345, "listing": "lll", "heldout": "taken"},
    "heldout": {"before": BEFORE, "after": AFTER, "images": 256},
    "stopped_early": None,
    "versions": {"kuea-mllm": "1.2.3", "torch": "2.0", "numpy": "9"},
    "command": "kuea-mllm align <b>",
    "created": "2026-01-01",
    "fingerprint": "bbb",
}


def metric_rows() -> list[dict[str, Any]]:
    """Rows of 20 updates, with a measurement at the start, in the middle and at the end."""
    rows: list[dict[str, Any]] = [{"step": 0, **BEFORE}]
    for step in range(1, 21):
        rows.append(
            {
                "step": step,
                "loss": 10 / step,
                "loss_kernel": 0.1 / step,
                "loss_preserve": float(step - 1),
                "kernel_gamma": 1.0 + step / 100,
                "kernel_coef0": 1.0,
                "kernel_rho": 1.0 + step / 100,
                "lr": 1e-5,
                "grad_norm": 5.0,
                "images_per_second": 100.0,
            }
        )
        if step % 10 == 0:
            rows.append({"step": step, **AFTER})
    return rows


def write_run(directory: Path, *, with_attention: bool = False, **changes: Any) -> Path:
    """Write a run directory; changes replace entries of the manifest."""
    random = np.random.default_rng(0)
    (directory / "tower").mkdir(parents=True)
    manifest = {**copy.deepcopy(MANIFEST), **changes}
    (directory / "tower" / "kuea.json").write_text(json.dumps(manifest))
    lines = [json.dumps(row) + "\n" for row in metric_rows()]
    (directory / "metrics.jsonl").write_text("".join(lines))
    matrices = {name: random.random((6, 6)).tolist() for name in ("original", "aligned", "teacher")}
    (directory / "kernel_matrices.json").write_text(json.dumps(matrices))
    if with_attention:
        np.savez(
            directory / "attention.npz",
            images=random.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8),
            original=random.random((2, 4, 4)),
            aligned=random.random((2, 4, 4)),
        )
    return directory
