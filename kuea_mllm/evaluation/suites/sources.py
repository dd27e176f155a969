"""The columns of the LLaVA suite that tasks of ours measure: data, prompt, metric, statistic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kuea_mllm.evaluation.statistics import (
    ALL_RIGHT_IN_CLUSTER,
    MEAN,
    MEAN_OF_GROUP_RATIOS,
    MEAN_OF_GROUPS,
)
from kuea_mllm.evaluation.suites.documents import Document
from kuea_mllm.evaluation.suites.schemas.ai2d import CHOICES, read_ai2d
from kuea_mllm.evaluation.suites.schemas.llava_bench import (
    read_llava_bench_coco,
    read_llava_bench_wild,
)
from kuea_mllm.evaluation.suites.schemas.mmvp import read_mmvp
from kuea_mllm.evaluation.suites.schemas.refcoco import read_refcoco
from kuea_mllm.evaluation.suites.schemas.simple import (
    COUNT_LETTERS,
    TRUE_FALSE,
    YES_NO,
    read_pope,
    read_tallyqa,
    read_vsr,
)
from kuea_mllm.evaluation.suites.schemas.textvqa import read_textvqa
from kuea_mllm.evaluation.suites.schemas.vqav2 import read_vqav2

BOX_METRIC = "box_accuracy"
PADDED = "padded"
"""The protocol that maps boxes from the padded square."""

_SCORING = "kuea_mllm.evaluation.suites.scoring"
_TEXT = MappingProxyType({"max_new_tokens": 128, "do_sample": False})
# As in LLaVA's own script: its answers are paragraphs.
_PARAGRAPHS = MappingProxyType({"max_new_tokens": 1024, "do_sample": False})


@dataclass(frozen=True)
class Source:
    """Where a column comes from and how it is scored.

    Attributes:
        column: Name in the paper's tables.
        dataset: Data set, as recipes call it.
        read: Reads the documents from the folder of the data set.
        metric: Name of the metric in lmms-eval.
        process: Dotted name of the function that scores one document.
        aggregate: Dotted name of the function that makes the column's score of them.
        statistic: What that function computes (see `evaluation.statistics`).
        generation: How answers are decoded.
        judged: Whether a language model scores the answers.
        documents: Size of the full set.
    """

    column: str
    dataset: str
    read: Callable[[Path], list[Document]]
    metric: str
    process: str
    aggregate: str
    statistic: str
    generation: Mapping[str, Any]
    judged: bool
    documents: int


def _source(
    column: str,
    dataset: str,
    read: Callable[[Path], list[Document]],
    documents: int,
    scoring: tuple[str, str],
    *,
    aggregate: str = "mean",
    statistic: str = MEAN,
    generation: Mapping[str, Any] = _TEXT,
    judged: bool = False,
) -> Source:
    metric, process = scoring
    return Source(
        column=column,
        dataset=dataset,
        read=partial(_read_absolute, read),
        metric=metric,
        process=f"{_SCORING}.{process}",
        aggregate=f"{_SCORING}.{aggregate}",
        statistic=statistic,
        generation=generation,
        judged=judged,
        documents=documents,
    )


def _read_absolute(read: Callable[[Path], list[Document]], folder: Path) -> list[Document]:
    # Not resolved: what lies beside a folder lies beside the link to it.
    return read(folder.absolute())


def _choice(candidates: tuple[str, ...]) -> Mapping[str, Any]:
    return MappingProxyType({"candidates": list(candidates), "max_new_tokens": 1})


_CHOICE = ("accuracy", "process_choice")
_EXACT = ("accuracy", "process_text")
_VQA = ("vqa_accuracy", "process_vqav2")
_OCR = ("textvqa_accuracy", "process_textvqa")
_RAW_BOX = (BOX_METRIC, "process_box_raw")
_JUDGED = ("judged", "keep_answer")

_PAPER = (
    _source("AI2D", "ai2d", read_ai2d, 15_501, _CHOICE, generation=_choice(CHOICES)),
    _source("text-ocr", "textvqa", partial(read_textvqa, with_ocr=True), 5_000, _OCR),
    _source("text-pure", "textvqa", partial(read_textvqa, with_ocr=False), 5_000, _OCR),
    _source(
        "pope",
        "pope",
        read_pope,
        8_910,
        _CHOICE,
        aggregate="mean_of_groups",
        statistic=MEAN_OF_GROUPS,
        generation=_choice(YES_NO),
    ),
    _source(
        "tallyQA",
        "tallyqa",
        partial(read_tallyqa, as_choice=True),
        38_589,
        _CHOICE,
        generation=_choice(COUNT_LETTERS),
    ),
    _source(
        "vsr",
        "vsr",
        partial(read_vsr, as_choice=True),
        1_222,
        _CHOICE,
        generation=_choice(TRUE_FALSE),
    ),
    _source("RefCOCOg", "refcocog", partial(read_refcoco, split_by="umd"), 4_896, _RAW_BOX),
    _source("RefCOCO+", "refcoco_plus", partial(read_refcoco, split_by="unc"), 10_758, _RAW_BOX),
    _source("RefCOCO", "refcoco", partial(read_refcoco, split_by="unc"), 10_834, _RAW_BOX),
    _source("vqa-v2", "vqav2", read_vqav2, 214_354, _VQA),
    _source(
        "llava-wild",
        "llava_bench_wild",
        read_llava_bench_wild,
        60,
        _JUDGED,
        aggregate="no_score",
        statistic=MEAN_OF_GROUP_RATIOS,
        generation=_PARAGRAPHS,
        judged=True,
    ),
    _source(
        "llava-coco",
        "llava_bench_coco",
        read_llava_bench_coco,
        90,
        _JUDGED,
        aggregate="no_score",
        statistic=MEAN_OF_GROUP_RATIOS,
        generation=_PARAGRAPHS,
        judged=True,
    ),
    _source(
        "MMVP",
        "mmvp",
        read_mmvp,
        300,
        ("pair_accuracy", "process_mmvp"),
        aggregate="all_right_in_pair",
        statistic=ALL_RIGHT_IN_CLUSTER,
    ),
)


def _padded(source: Source) -> Source:
    if source.metric != BOX_METRIC:
        return source
    return replace(source, process=f"{_SCORING}.process_box_padded")


SOURCES: Mapping[str, Mapping[str, Source]] = {
    "paper": {source.column: source for source in _PAPER},
    PADDED: {source.column: _padded(source) for source in _PAPER},
    # Where lmms-eval has no task: answers are written, and have to be right to the letter.
    "lmms-eval": {
        source.column: source
        for source in (
            _source("tallyQA", "tallyqa", partial(read_tallyqa, as_choice=False), 38_589, _EXACT),
            _source("vsr", "vsr", partial(read_vsr, as_choice=False), 1_222, _EXACT),
        )
    },
}
"""Columns of ours by protocol and name, in the order of the paper's Table 5."""
