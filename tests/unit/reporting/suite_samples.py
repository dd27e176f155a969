"""Two results directories with all columns of the paper, small, and their comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from reporting_samples import AVERAGE, make_column, make_comparison

PictureMaker = Callable[[int], Image.Image]

_KINDS = ("complex", "conv", "detail")
# Task, display name, statistic, share right before and after, parts.
COLUMNS: tuple[tuple[str, str, str, float, float, tuple[str, ...]], ...] = (
    ("kuea_paper_ai2d", "AI2D", "mean", 0.53, 0.52, ("test", "val")),
    ("kuea_paper_text_ocr", "text-ocr", "mean", 0.57, 0.58, ()),
    ("kuea_paper_text_pure", "text-pure", "mean", 0.48, 0.49, ()),
    ("kuea_paper_pope", "pope", "mean_of_groups", 0.85, 0.86, ("adversarial", "popular", "random")),
    ("kuea_paper_tallyqa", "tallyQA", "mean", 0.61, 0.62, ("complex", "simple")),
    ("kuea_paper_vsr", "vsr", "mean", 0.51, 0.56, ()),
    ("kuea_paper_refcocog", "RefCOCOg", "mean", 0.55, 0.58, ()),
    ("kuea_paper_refcoco_plus", "RefCOCO+", "mean", 0.52, 0.56, ()),
    ("kuea_paper_refcoco", "RefCOCO", "mean", 0.60, 0.64, ()),
    ("kuea_paper_vqav2", "vqa-v2", "mean", 0.76, 0.76, ()),
    (
        "kuea_paper_llava_wild",
        "llava-wild",
        "mean_of_group_ratios",
        0.43,
        0.45,
        ("complex", "conv"),
    ),
    (
        "kuea_paper_llava_coco",
        "llava-coco",
        "mean_of_group_ratios",
        0.75,
        0.78,
        ("complex", "conv"),
    ),
    ("kuea_paper_mmvp", "MMVP", "all_right_in_cluster", 0.46, 0.52, ()),
)
_ASKED = {
    "AI2D": ("Which of these is eaten by the heron?\nA. frog\nB. grass\nC. hawk\nD. sun", "A", "C"),
    "pope": ("Is there a dining table in the image?", "yes", "no"),
    "tallyQA": ("How many people are wearing hats?", "3", "4"),
    "vsr": ('Is this statement "True" or "False"? The cat is left of the sofa.', "True", "False"),
    "llava-wild": (
        "Describe this photo in detail.",
        "A red flower with many petals stands before dark leaves.",
        "The image shows a large flower.",
    ),
}


def simple_picture(number: int) -> Image.Image:
    """Draw something that differs by number."""
    colour = tuple(int(c) for c in np.random.default_rng(number).integers(60, 220, 3))
    image = Image.new("RGB", (320, 240), colour)
    ImageDraw.Draw(image).ellipse((60 + number % 50, 50, 180, 200), fill=(240, 240, 200))
    return image


def make_world(
    folder: Path, *, questions: int = 24, picture: PictureMaker = simple_picture
) -> tuple[Path, Path, dict[str, Any]]:
    """Write two results directories and return them with the comparison's JSON form."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(questions // 2):
        picture(number).save(images / f"{number}.jpg")
    runs = [folder / "llava-1.5-7b", folder / "llava-1.5-7b-kuea-lora"]
    rows = [
        _write_run(run, side, questions=questions, images=images) for side, run in enumerate(runs)
    ]
    columns = [
        _compare(task, column, rows[0][task], rows[1][task], statistic)
        for task, column, statistic, *_ in COLUMNS
    ]
    sides = {
        side: {"path": str(run), "model": {"name": run.name, "tower_fingerprint": side}}
        for side, run in zip(("baseline", "candidate"), runs, strict=True)
    }
    average = AVERAGE | {"columns": [c["task"] for c in columns], "difference": 0.0164}
    average |= {"baseline": 0.6006, "candidate": 0.6170, "low": 0.0081, "high": 0.0247}
    average |= {"p_value": 0.0004, "verdict": "better"}
    return runs[0], runs[1], make_comparison(*columns, average=average, **sides)


def write_thumbnails(run: Path, task: str, pictures: Sequence[tuple[int, str, bytes]]) -> None:
    """Write pictures as the evaluation keeps them: document, file name, content."""
    folder = run / "thumbnails" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for doc_id, name, content in pictures:
        (folder / name).write_bytes(content)
        lines.append(json.dumps({"doc_id": doc_id, "picture": name}) + "\n")
    (run / "thumbnails" / f"{task}.jsonl").write_text("".join(lines))


def _write_run(
    run: Path, side: int, *, questions: int, images: Path
) -> dict[str, list[dict[str, Any]]]:
    (run / "samples").mkdir(parents=True)
    entries, written = {}, {}
    for number, (task, column, statistic, before, after, groups) in enumerate(COLUMNS):
        rows = _rows(column, statistic, (before, after), groups, side, number, questions, images)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "samples" / f"{task}.jsonl").write_text(text)
        written[task] = rows
        entries[task] = _entry(task, column, statistic, groups, rows)
    (run / "summary.json").write_text(json.dumps(_summary(run, side, entries)))
    return written


def _rows(
    column: str,
    statistic: str,
    chances: tuple[float, float],
    groups: Sequence[str],
    side: int,
    number: int,
    questions: int,
    images: Path,
) -> list[dict[str, Any]]:
    # The same luck for both sides, so that most answers agree, as they do in life.
    shared = np.random.default_rng([number, 0]).random(questions)
    own = np.random.default_rng([number, 1 + side]).normal(0, 0.08, questions)
    luck = np.clip(shared + own, 0, 1)
    question, right, wrong = _ASKED.get(
        column, ("What is written on the sign?", "no parking", "parking")
    )
    rows = []
    for doc_id in range(questions):
        is_right = bool(luck[doc_id] < chances[side])
        row: dict[str, Any] = {
            "doc_id": doc_id,
            "cluster": f"image-{doc_id // 2}",
            "question": question,
            "target": right,
            "answer": right if is_right else wrong,
            "score": float(is_right),
            "failed": False,
            "image": str(images / f"{doc_id // 2}.jpg"),
        }
        if groups:
            row["group"] = groups[doc_id % len(groups)]
        if statistic == "mean_of_group_ratios":
            row |= {"score": 8.0 if is_right else 3.5, "reference": 8.5}
        if column.startswith("RefCOCO"):
            target = [0.22, 0.2, 0.58, 0.84]
            answer = [0.24, 0.23, 0.6, 0.82] if is_right else [0.05, 0.1, 0.3, 0.5]
            row |= {
                "question": "Please provide the bounding box coordinate of the region this "
                'sentence describes: "the flower in the middle"',
                "target": str(target),
                "answer": str(answer),
                "target_box": target,
                "answer_box": answer,
            }
        rows.append(row)
    return rows


def _entry(
    task: str, column: str, statistic: str, groups: Sequence[str], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    judged = statistic == "mean_of_group_ratios"
    score = float(np.mean([row["score"] / row.get("reference", 1) for row in rows]))
    scale = 100 if judged else 1
    return {
        "task": task,
        "column": column,
        "suite": "llava-paper",
        "protocol": "paper",
        "statistic": statistic,
        "judged": judged,
        "missing": None,
        "metric": "judge" if judged else "accuracy",
        "score": score * scale,
        "scale": scale,
        "stderr": 0.01 * scale,
        "higher_is_better": True,
        "n": len(rows),
        "clusters": len({row["cluster"] for row in rows}),
        "failed": 0,
        "samples": f"samples/{task}.jsonl",
        "breakdown": dict.fromkeys(groups, score * scale),
    }


def _summary(run: Path, side: int, entries: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": "mllm",
        "base": {"reference": "llava-hf/llava-1.5-7b-hf"},
        "command": "kuea-mllm swap --base llava-hf/llava-1.5-7b-hf --tower aligned --out m",
        "tower": {
            "source": "runs/vit-l-14-336/tower",
            "fingerprints": {"float32": "candidate"},
            "spec": {"family": "clip", "image_size": 336, "hidden_act": "quick_gelu"},
            "manifest": {
                "base_tower": {"reference": "openai/clip-vit-large-patch14-336"},
                "teacher": {"reference": "facebook/dinov2-large"},
                "objective": {"kernel": "polynomial", "preserve_weight": 0.5},
            },
        },
        "tuned": {
            "weights": "runs/lora/adapter",
            "record": {"lora": {"rank": 128, "alpha": 256}, "trained": {"trainable": 319815680}},
        },
    }
    return {
        "schema_version": 2,
        "kind": "results",
        "model": {
            "path": f"/models/{run.name}",
            "name": run.name,
            "adapter": "llava",
            "tower_fingerprint": ("6d1f" * 16, "a93c" * 16)[side],
            "tower": None,
        },
        "model_record": record if side else {},
        "columns": entries,
        "settings": {
            "suite": "llava-paper",
            "protocol": "paper",
            "batch_size": 16,
            "limit": 24,
            "limit_seed": 7,
            "dtype": "bfloat16",
            "device": "cuda",
            "judge": {"url": "http://localhost:8000/v1", "model": "qwen3-32b", "prompt": "ab12"},
        },
        "versions": {"torch": "2.15.0", "lmms_eval": "0.7.3"},
        "created": "2026-11-22T10:00:00+00:00",
        "command": f"kuea-mllm eval --model {run.name} --suite llava-paper",
        "seconds": 5211.4 + side,
    }


def _compare(
    task: str,
    column: str,
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    statistic: str,
) -> dict[str, Any]:
    gains = [new["score"] - old["score"] for old, new in zip(before, after, strict=True)]
    largest = 8.5 if statistic == "mean_of_group_ratios" else 1.0
    means = [float(np.mean([row["score"] for row in rows])) / largest for rows in (before, after)]
    gap = means[1] - means[0]
    spread = 0.02 if abs(gap) > 0.03 else 0.05
    verdict = "better" if gap > spread else "worse" if gap < -spread else "cannot tell"
    return make_column(
        task,
        "accuracy",
        column=column,
        statistic=statistic,
        baseline=means[0],
        candidate=means[1],
        difference=gap,
        low=gap - spread,
        high=gap + spread,
        p_holm=0.5 if verdict == "cannot tell" else 0.003,
        verdict=verdict,
        n=len(before),
        clusters=len(before) // 2,
        improved=_flips(gains, 1),
        worsened=_flips(gains, -1),
    )


def _flips(gains: Sequence[float], sign: int) -> dict[str, Any]:
    doc_ids = [number for number, gain in enumerate(gains) if gain * sign > 0]
    return {"count": len(doc_ids), "doc_ids": doc_ids}
