"""How the answers of the LLaVA columns become scores; named in task files by `!function`.

What processes a document returns its metric with an item: score (0 to 1), image, group, boxes.
What aggregates turns the items of all documents into the column's score, a fraction.

- choice: the model class returns the candidate whose first token is likeliest; it is right or not.
- text: right if it equals the target, both lower-cased and without blanks around them.
- VQAv2: share of annotators who agree. Of the answer punctuation, number words and articles are
  normalised, of the annotators' only punctuation.
- TextVQA: share of annotators who agree, both sides in the form of M4C's evaluator.
- box: the whole answer has to be a list of four numbers; right from IoU 0.5 on.
- MMVP: the option that an answer names (`read_option`); a pair is right when both answers are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.fewshot.vqa_accuracy import normalise_answer, strip_punctuation
from kuea_mllm.evaluation.statistics import (
    ALL_RIGHT_IN_CLUSTER,
    MEAN,
    MEAN_OF_GROUPS,
    score_items,
)
from kuea_mllm.evaluation.suites.boxes import Box, iou, parse_box, rounded, to_image
from kuea_mllm.evaluation.suites.documents import Row

Item = dict[str, Any]
Items = Sequence[Mapping[str, Any]]

ENOUGH_IOU = 0.5
_LETTER_FIRST = re.compile(r"\(?([A-Za-z])\)?(?:[.:,)]|\s*$)")
_LETTER_SAID = re.compile(r"\b(?:[Aa]nswer is|[Oo]ption):?\s+([A-Z])(?!\w)")
_BRACKETED = re.compile(r"\(([A-Za-z])\)")
# The annotators of a large data set give few different answers.
_without_punctuation = lru_cache(maxsize=1 << 16)(strip_punctuation)


def process_choice(doc: Row, results: Sequence[str]) -> dict[str, Item]:
    """Score an answer that was chosen among the candidates by its first token."""
    return {"accuracy": _item(doc, results[0].strip() == doc["target"])}


def process_text(doc: Row, results: Sequence[str]) -> dict[str, Item]:
    """Score a written answer that has to be the right one, case and outer blanks aside."""
    said = results[0].strip().lower()
    return {"accuracy": _item(doc, said == str(doc["target"]).strip().lower())}


def process_vqav2(doc: Row, results: Sequence[str]) -> dict[str, Item]:
    """Score as the paper's harness does: of the annotated answers only punctuation goes."""
    said = _said(results)
    answers = [_without_punctuation(str(answer)) for answer in doc["extra"]["answers"]]
    score = 0.0 if said is None else _agreement(normalise_answer(said), answers)
    return {"vqa_accuracy": _item(doc, score)}


def process_textvqa(doc: Row, results: Sequence[str]) -> dict[str, Item]:
    """Score as M4C's evaluator does, which brings both sides to the same form."""
    said = _said(results)
    answers = [m4c_form(str(answer)) for answer in doc["extra"]["answers"]]
    score = 0.0 if said is None else _agreement(m4c_form(said), answers)
    return {"textvqa_accuracy": _item(doc, score)}


def process_box_raw(doc: Row, results: Sequence[str]) -> dict[str, Item]:
    """Compare the box as it is with the annotation, rounded: what the paper's harness does."""
    return _process_box(doc, parse_box(results[0]), rounded(_annotated(doc)))


def process_box_padded(doc: Row, results: Sequence[str]) -> dict[str, Item]:
    """Map the box from the padded square to the image before it is compared."""
    extra = doc["extra"]
    said = parse_box(results[0])
    mapped = None if said is None else to_image(said, int(extra["width"]), int(extra["height"]))
    return _process_box(doc, mapped, _annotated(doc))


def process_mmvp(doc: Row, results: Sequence[str]) -> dict[str, Item]:
    """Score the option that an answer names."""
    said = _said(results)
    extra = doc["extra"]
    options = dict(zip(extra["letters"], extra["options"], strict=True))
    letter = None if said is None else read_option(said, options)
    return {"pair_accuracy": _item(doc, letter is not None and f"({letter})" == doc["target"])}


def keep_answer(doc: Row, results: Sequence[str]) -> dict[str, Item]:
    """Leave the score to a judge, which comes later."""
    del results
    item = _item(doc, 0.0)
    # lmms-eval computes with every score that it finds.
    del item["score"]
    return {"judged": item}


def mean(items: Items) -> float:
    """Return the mean score."""
    return score_items(MEAN, items)


def mean_of_groups(items: Items) -> float:
    """Return the mean over groups of the mean score of each."""
    return score_items(MEAN_OF_GROUPS, items)


def all_right_in_pair(items: Items) -> float:
    """Return the share of pairs of which both are right."""
    return score_items(ALL_RIGHT_IN_CLUSTER, items)


def no_score(items: Items) -> float:
    """Return no number: a judge has not been heard yet."""
    del items
    return math.nan


@lru_cache(maxsize=1 << 16)
def m4c_form(text: str) -> str:
    """Bring an answer to the form in which M4C's evaluator compares answers."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_answer(plain.strip())


def read_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Find which option of MMVP an answer names.

    MMVP's own grading asks GPT-4 whether an answer means the right option. Here it is, in this
    order: the letter that the answer begins with, as `(a)`, `a)`, `a.`, `a:`, `a,` or alone; the
    capital after "answer is" or "option"; the one letter in brackets; the one option whose words
    it holds.

    Args:
        answer: What the model said.
        options: Text of each option by its letter.

    Returns:
        The letter; None where the answer names none of the options, or several.
    """
    text = answer.strip()
    for letters in (
        _LETTER_FIRST.match(text),
        _LETTER_SAID.search(text),
    ):
        if letters is not None and letters[1].lower() in options:
            return letters[1].lower()
    named = {letter.lower() for letter in _BRACKETED.findall(text)} & set(options)
    if named:
        return named.pop() if len(named) == 1 else None
    return _option_in_words(text, options)


def _option_in_words(text: str, options: Mapping[str, str]) -> str | None:
    rest, found = text.lower(), []
    # The longest first, and taken out: "not moving" holds "moving".
    for letter, option in sorted(options.items(), key=lambda entry: -len(entry[1])):
        words = option.strip().rstrip(".").lower()
        if not words:
            continue
        pattern = re.compile(rf"(?<!\w){re.escape(words)}(?!\w)")
        if pattern.search(rest):
            found.append(letter)
            rest = pattern.sub("|", rest)
    return found[0] if len(found) == 1 else None


def _process_box(doc: Row, said: Box | None, annotated: Box) -> dict[str, Item]:
    is_right = said is not None and iou(said, annotated) >= ENOUGH_IOU
    item = _item(doc, is_right)
    item["target_box"] = list(annotated)
    if said is not None:
        item["answer_box"] = list(said)
    return {"box_accuracy": item}


def _annotated(doc: Row) -> Box:
    left, top, right, bottom = (float(value) for value in doc["extra"]["box"])
    return left, top, right, bottom


def _agreement(said: str, answers: Sequence[str]) -> float:
    """Return how many agree, for each annotator among the others; three are enough."""
    agrees = [answer == said for answer in answers]
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(agrees)


def _item(doc: Row, score: float) -> Item:
    item: Item = {"score": float(score), "image_id": doc["image_id"], "image": doc["image"]}
    if doc.get("group") is not None:
        item["group"] = doc["group"]
    return item


def _said(results: Sequence[str]) -> str | None:
    return None if results[0] == FAILED_ANSWER else results[0]
