"""The seven data sets of the published few-shot evaluation: their files, prompts and limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from kuea_mllm.evaluation.fewshot.examples import Example
from kuea_mllm.evaluation.fewshot.schemas import (
    Part,
    VqaFiles,
    read_hateful_memes,
    read_karpathy,
    read_vqa,
)

Style = Literal["caption", "vqa", "hateful"]
CLASS_NAMES = ("no", "yes")
"""Of HatefulMemes, by label."""


@dataclass(frozen=True)
class FewShotData:
    """One data set.

    Attributes:
        name: As in recipes.
        style: Which prompt, post-processing and metric it has.
        max_new_tokens: Most tokens of an answer; of no effect where class names are ranked.
        read: Reads one part of a folder.
        stem_source: File whose `raw_answer` and `answer` teach the stems that answers are
            compared by; None where answers are compared as they are.
    """

    name: str
    style: Style
    max_new_tokens: int
    read: Callable[[Path, Part], list[Example]]
    stem_source: str | None = None


_COCO_IMAGE = "{part}2014/COCO_{part}2014_{id:012d}.jpg"
_V2 = VqaFiles(
    questions="v2_OpenEnded_mscoco_{part}2014_questions.json",
    annotations="v2_mscoco_{part}2014_annotations.json",
    image=_COCO_IMAGE,
)
_OK = VqaFiles(
    questions="OpenEnded_mscoco_{part}2014_questions.json",
    annotations="mscoco_{part}2014_annotations.json",
    image=_COCO_IMAGE,
)
# Its validation images lie among the training images, as in the original archive.
_TEXT = VqaFiles(
    questions="{part}_questions_vqa_format.json",
    annotations="{part}_annotations_vqa_format.json",
    image="train_images/{id}.jpg",
)
_VIZWIZ = VqaFiles(
    questions="{part}_questions_vqa_format.json",
    annotations="{part}_annotations_vqa_format.json",
    image="{part}/{id}",
)

DATASETS: dict[str, FewShotData] = {
    data.name: data
    for data in (
        FewShotData("coco", "caption", 20, partial(read_karpathy, file="dataset_coco.json")),
        FewShotData(
            "flickr30k",
            "caption",
            20,
            partial(read_karpathy, file="dataset_flickr30k.json", images="flickr30k-images"),
        ),
        FewShotData("vqav2", "vqa", 5, partial(read_vqa, files=_V2)),
        FewShotData(
            "okvqa",
            "vqa",
            5,
            partial(read_vqa, files=_OK),
            stem_source="mscoco_train2014_annotations.json",
        ),
        FewShotData("textvqa", "vqa", 10, partial(read_vqa, files=_TEXT)),
        FewShotData("vizwiz", "vqa", 5, partial(read_vqa, files=_VIZWIZ)),
        FewShotData("hatefulmemes", "hateful", 1, read_hateful_memes),
    )
}
