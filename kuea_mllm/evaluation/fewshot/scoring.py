"""What the task files of the few-shot evaluation name: prompts, images, scores (for lmms-eval)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.fewshot_text import cut_answer, cut_caption
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.fewshot.captions import score_captions
from kuea_mllm.evaluation.fewshot.datasets import CLASS_NAMES
from kuea_mllm.evaluation.fewshot.examples import read_examples
from kuea_mllm.evaluation.fewshot.images import StoredImage
from kuea_mllm.evaluation.fewshot.plan import Plan, read_plan
from kuea_mllm.evaluation.fewshot.prompts import build_prompt
from kuea_mllm.evaluation.fewshot.stemming import Stemmer, load_language
from kuea_mllm.evaluation.fewshot.vqa_accuracy import vqa_accuracy

Document = Mapping[str, Any]


def doc_to_text(doc: Document, lmms_eval_specific_kwargs: Mapping[str, Any]) -> str:
    """Return the prompt of a document, demonstrations included."""
    plan, pool, asked = _opened(str(lmms_eval_specific_kwargs["plan"]))
    number = int(doc["number"])
    shown = [pool[index] for index in plan.demonstrations[number].tolist()]
    return build_prompt(plan.style, shown, asked[number], with_images=plan.shots > 0)


def doc_to_visual(doc: Document, lmms_eval_specific_kwargs: Mapping[str, Any]) -> list[StoredImage]:
    """Return the images of the prompt in order, the document's own last."""
    plan, pool, asked = _opened(str(lmms_eval_specific_kwargs["plan"]))
    number = int(doc["number"])
    shown = plan.demonstrations[number].tolist() if plan.passes_images else []
    paths = [*(pool[index].image for index in shown), asked[number].image]
    return [StoredImage(path) for path in paths]


def process_caption(doc: Document, results: Sequence[str]) -> dict[str, Any]:
    """Keep a caption beside its references; CIDEr needs all of them at once."""
    answer = _said(results)
    item = {
        "image_id": doc["image_id"],
        "prediction": "" if answer is None else cut_caption(answer),
        "references": list(doc["captions"]),
    }
    return {"cider": item}


def process_vqa(doc: Document, results: Sequence[str]) -> dict[str, Any]:
    """Score an answer against those of all annotators."""
    return _vqa(doc, results, released=False)


def process_vqa_released(doc: Document, results: Sequence[str]) -> dict[str, Any]:
    """Score an answer as the released scorer does, where the same annotations count as one."""
    return _vqa(doc, results, released=True)


def process_hateful(doc: Document, results: Sequence[str]) -> dict[str, Any]:
    """Turn the log-likelihoods of the class names into the probability of "yes"."""
    answer = _said(results)
    # Without an answer neither class is likelier; the row is marked as failed.
    likelihoods = dict.fromkeys(CLASS_NAMES, 0.0) if answer is None else json.loads(answer)
    item = {
        "image_id": doc["image_id"],
        "score": label_probability(likelihoods, CLASS_NAMES[1]),
        "label": int(doc["label"]),
    }
    return {"roc_auc": item}


def mean_percent(items: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean score times 100."""
    return 100.0 * sum(float(item["score"]) for item in items) / len(items)


def cider(items: Sequence[dict[str, Any]]) -> float:
    """Return CIDEr times 100, and leave each image's share of it with the image.

    What a phrase weighs comes from the references of all images, so that an image has a score only
    here, and the same weights in every run on these documents. lmms-eval keeps the items beside the
    answers, where two runs are then compared image by image.
    """
    score, each = score_captions(
        [str(item["prediction"]) for item in items], [list(item["references"]) for item in items]
    )
    for item, own in zip(items, each, strict=True):
        item["score"] = own
    return 100.0 * score


def roc_auc_percent(items: Sequence[Mapping[str, Any]]) -> float:
    """Return the ROC-AUC of the probabilities times 100."""
    return 100.0 * roc_auc(
        [float(item["score"]) for item in items], [int(item["label"]) for item in items]
    )


def label_probability(likelihoods: Mapping[str, float], label: str) -> float:
    """Return the probability of a label among those given, out of log-likelihoods."""
    highest = max(likelihoods.values())
    total = sum(math.exp(value - highest) for value in likelihoods.values())
    return math.exp(likelihoods[label] - highest) / total


def roc_auc(probabilities: Sequence[float], labels: Sequence[int]) -> float:
    """Return the area under the ROC curve.

    Raises:
        EvaluationError: If all labels are the same.
    """
    from sklearn.metrics import roc_auc_score

    if len(set(labels)) < 2:
        raise EvaluationError(
            f"ROC-AUC needs documents of both classes; all {len(labels)} have label "
            f"{labels[0] if labels else 'none'}.",
            "Use more documents (--limit).",
        )
    return float(roc_auc_score(labels, probabilities))


def _vqa(doc: Document, results: Sequence[str], *, released: bool) -> dict[str, Any]:
    answer = _said(results)
    cut = "" if answer is None else cut_answer(answer)
    if answer is not None and doc.get("stems"):
        cut = _stemmer(str(doc["stems"])).stem(cut)
    entries = [int(entry) for entry in doc["entries"]] if released else None
    score = 0.0 if answer is None else vqa_accuracy(cut, list(doc["answers"]), entries)
    return {"vqa_accuracy": {"score": score, "image_id": doc["image_id"], "prediction": cut}}


def _said(results: Sequence[str]) -> str | None:
    return None if results[0] == FAILED_ANSWER else results[0]


@lru_cache(maxsize=2)
def _examples(path: str) -> Any:
    return read_examples(Path(path))


@lru_cache(maxsize=2)
def _plan(path: str) -> Plan:
    return read_plan(Path(path))


def _opened(path: str) -> tuple[Plan, Any, Any]:
    plan = _plan(path)
    return plan, _examples(plan.pool), _examples(plan.documents)


@lru_cache(maxsize=1)
def _stemmer(path: str) -> Stemmer:
    return Stemmer(json.loads(Path(path).read_text(encoding="utf-8")), load_language())
