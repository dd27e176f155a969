"""What the task files of the mini world call inside lmms-eval.

lmms-eval loads this module anew for each function it names, so nothing here keeps any state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]
Item = dict[str, Any]

_BOX = re.compile(r"\[\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*\]")
_IOU_THRESHOLD = 0.5


def doc_to_visual(doc: Document) -> list[Any]:
    """Return the picture of a document."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: Document, lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """Return the question, with the text that the task file puts around it."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question']}{around.get('post_prompt', '')}"


def process_pope(doc: Document, results: Sequence[str]) -> dict[str, Item]:
    """Score a yes/no answer as POPE does: the first word counts."""
    guess = _first_word(results[0])
    item = {"score": float(guess == doc["answer"]), "image_id": doc["image_id"]}
    item |= {"prediction": guess, "answer": doc["answer"]}
    return dict.fromkeys(("accuracy", "f1_score", "yes_ratio"), item)


def process_exact(doc: Document, results: Sequence[str]) -> dict[str, Item]:
    """Score a short answer: right if equal, apart from case, spaces and a final period."""
    guess = results[0].strip().rstrip(".").lower()
    item = {"score": float(guess == doc["answer"]), "image_id": doc["image_id"]}
    return {"exact_match": item | {"prediction": guess, "kind": doc["kind"]}}


def process_box(doc: Document, results: Sequence[str]) -> dict[str, Item]:
    """Score a box: right if its overlap with the true one is above one half.

    The pictures are square, so the padding that LLaVA adds to others cannot blur the comparison.
    """
    overlap = box_iou(parse_box(results[0]), doc["bbox"])
    common = {"image_id": doc["image_id"], "prediction": results[0]}
    return {
        "iou_over_50": {"score": float(overlap > _IOU_THRESHOLD), **common},
        "mean_iou": {"score": overlap, **common},
    }


def mean_score(items: Sequence[Item]) -> float:
    """Average the scores."""
    return float(sum(item["score"] for item in items) / len(items))


def f1_score(items: Sequence[Item]) -> float:
    """Compute F1 of the answer "yes"."""
    right = sum(item["prediction"] == "yes" == item["answer"] for item in items)
    named = sum(item["prediction"] == "yes" for item in items)
    true = sum(item["answer"] == "yes" for item in items)
    return float(2 * right / (named + true)) if named + true else 0.0


def yes_ratio(items: Sequence[Item]) -> float:
    """Compute the share of predictions that are "yes"."""
    return float(sum(item["prediction"] == "yes" for item in items) / len(items))


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """Find the first "[a, b, c, d]" in a text; None without one, or with a malformed number."""
    found = _BOX.search(text)
    if found is None:
        return None
    try:
        left, top, right, bottom = (float(number) for number in found.groups())
    except ValueError:
        return None
    return left, top, right, bottom


def box_iou(first: Sequence[float] | None, second: Sequence[float]) -> float:
    """Compute the overlap of two boxes (left, top, right, bottom): intersection over union."""
    if first is None:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return float(shared / (sum(areas) - shared))


def _first_word(text: str) -> str:
    words = re.findall(r"[a-z]+", text.lower())
    return words[0] if words else ""
