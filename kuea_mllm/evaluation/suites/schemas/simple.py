"""Data sets with one flat list of questions: POPE, TallyQA, VSR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.evaluation.suites import prompts
from kuea_mllm.evaluation.suites.documents import Document, shared
from kuea_mllm.evaluation.suites.schemas.reading import (
    converted,
    first_file,
    image_file,
    image_folder,
    read_lines,
    read_list,
)

POPE_PARTS = ("adversarial", "popular", "random")
YES_NO = ("Yes", "No")
TRUE_FALSE = ("True", "False")
COUNT_LETTERS = prompts.LETTERS[: len(prompts.COUNTS)]


def read_pope(folder: Path) -> list[Document]:
    """Read POPE's three sets of questions about COCO val2014.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    images = image_folder(folder, "val2014")
    documents: list[Document] = []
    for part in POPE_PARTS:
        # Lines of JSON, whatever the name says.
        path = first_file(folder, f"coco_pope_{part}.json", f"coco_pope_{part}.jsonl")

        def document(line: Mapping[str, Any], part: str = part) -> Document:
            label = str(line["label"])
            if label not in ("yes", "no"):
                raise ValueError(f"label {label!r}, yes or no was expected")
            return Document(
                image=shared(image_file(images, line["image"])),
                image_id=shared(line["image"]),
                prompt=prompts.short_answer(str(line["text"])),
                target=label.capitalize(),
                candidates=YES_NO,
                group=part,
            )

        documents += converted(path, read_lines(path), document)
    return documents


def read_tallyqa(folder: Path, *, as_choice: bool) -> list[Document]:
    """Read TallyQA's test questions about images of Visual Genome and COCO.

    Args:
        folder: Folder of the data set.
        as_choice: Whether the answer is one of the letters A to P, which stand for 0 to 15.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    path = folder / "test.json"

    def document(entry: Mapping[str, Any]) -> Document:
        count, question = int(entry["answer"]), str(entry["question"])
        if not 0 <= count < len(prompts.COUNTS):
            raise ValueError(f"answer {count}, 0 to {len(prompts.COUNTS) - 1} was expected")
        part = str(entry["image"]).split("/", maxsplit=1)
        images = image_folder(folder, part[0])
        return Document(
            image=shared(image_file(images, part[1])),
            image_id=shared(entry["image"]),
            prompt=prompts.by_letter(question, prompts.COUNTS)
            if as_choice
            else prompts.short_answer(question),
            target=COUNT_LETTERS[count] if as_choice else str(count),
            candidates=COUNT_LETTERS if as_choice else (),
            group="simple" if _is_true(entry["issimple"]) else "complex",
        )

    return converted(path, read_list(path), document)


def read_vsr(folder: Path, *, as_choice: bool) -> list[Document]:
    """Read the test statements of VSR's zero-shot split.

    Args:
        folder: Folder of the data set.
        as_choice: Whether the answer is chosen by its first token.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    path = folder / "test.jsonl"

    def document(line: Mapping[str, Any]) -> Document:
        label = int(line["label"])
        if label not in (0, 1):
            raise ValueError(f"label {label}, 0 or 1 was expected")
        return Document(
            image=shared(image_file(folder / "images", line["image"])),
            image_id=shared(line["image"]),
            prompt=prompts.true_or_false(str(line["caption"])),
            target=TRUE_FALSE[1 - label],
            candidates=TRUE_FALSE if as_choice else (),
        )

    return converted(path, read_lines(path), document)


def _is_true(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"issimple is {value!r}, true or false was expected")
    return value
