"""LLaVA-Bench (in the wild, COCO): questions, a reference answer, and a text about the image.

A judge scores the answers; what it is shown stands in `extra`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.suites.documents import REMEDY, Document
from kuea_mllm.evaluation.suites.schemas.reading import (
    converted,
    image_file,
    image_folder,
    indexed,
    read_lines,
)

CATEGORIES = ("conv", "detail", "complex")


def read_llava_bench_wild(folder: Path) -> list[Document]:
    """Read LLaVA-Bench in the wild; the judge sees the caption.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """

    def context(entry: Mapping[str, Any]) -> str:
        caption = entry["caption"]
        return "\n".join(map(str, caption)) if isinstance(caption, list) else str(caption)

    return _read(
        folder,
        questions="questions.jsonl",
        answers="answers_gpt4.jsonl",
        contexts="context.jsonl",
        image=lambda name: image_file(folder / "images", name),
        context=context,
    )


def read_llava_bench_coco(folder: Path) -> list[Document]:
    """Read LLaVA-Bench on COCO; the judge sees captions and boxes.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    images = image_folder(folder, "val2014")

    def image(name: str) -> Path:
        plain = image_file(images, name)
        # The questions name images by their number alone, COCO's archive does not.
        return plain if plain.is_file() else plain.with_name(f"COCO_val2014_{plain.name}")

    def context(entry: Mapping[str, Any]) -> str:
        captions = "\n".join(map(str, entry["captions"]))
        boxes = "\n".join(f"{one['category']}: {one['bbox']}" for one in entry["instances"])
        return f"{captions}\n\n{boxes}"

    return _read(
        folder,
        questions="qa90_questions.jsonl",
        answers="qa90_gpt4_answer.jsonl",
        contexts="caps_boxes_coco2014_val_80.jsonl",
        image=image,
        context=context,
    )


def _read(
    folder: Path,
    *,
    questions: str,
    answers: str,
    contexts: str,
    image: Callable[[str], Path],
    context: Callable[[Mapping[str, Any]], str],
) -> list[Document]:
    answer_path, context_path = folder / answers, folder / contexts
    references = {
        key: _text(answer_path, entry, key)
        for key, entry in indexed(answer_path, read_lines(answer_path), "question_id").items()
    }
    shown = dict(
        converted(
            context_path,
            read_lines(context_path),
            lambda entry: (str(entry["image"]), context(entry)),
        )
    )
    path = folder / questions

    def document(line: Mapping[str, Any]) -> Document:
        name, number, category = str(line["image"]), line["question_id"], str(line["category"])
        if category not in CATEGORIES:
            raise ValueError(f"category {category!r}, one of {', '.join(CATEGORIES)} was expected")
        if number not in references:
            raise ValueError(f"{answers} has no answer to question {number}")
        if name not in shown:
            raise ValueError(f"{contexts} says nothing about image {name}")
        question = str(line["text"])
        return Document(
            image=str(image(name)),
            image_id=name,
            prompt=question,
            target=references[number],
            group=category,
            extra={
                "question": question,
                "reference_answer": references[number],
                "context": shown[name],
                "category": category,
            },
        )

    return converted(path, read_lines(path), document)


def _text(path: Path, entry: Mapping[str, Any], key: object) -> str:
    if "text" not in entry:
        raise DataError(f"file {path}: the answer to question {key} has no key 'text'.", REMEDY)
    return str(entry["text"])
