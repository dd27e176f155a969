"""TextVQA: questions and answers, and the words that an OCR system read off the images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.suites import prompts
from kuea_mllm.evaluation.suites.documents import REMEDY, Document, shared
from kuea_mllm.evaluation.suites.schemas.reading import (
    bad_layout,
    converted,
    first_file,
    image_file,
    image_folder,
    read_lines,
    stream,
)

ANSWERS = "TextVQA_0.5.1_val.json"
# LLaVA's name, and the one that the paper's harness gives its copy.
LLAVA_OCR = ("llava_textvqa_val_v051_ocr.jsonl", "textvqa_val_v051_ocr.jsonl")
ROSETTA_OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"
ANNOTATORS = 10


def read_textvqa(folder: Path, *, with_ocr: bool) -> list[Document]:
    """Read the validation questions.

    The words come from LLaVA's question file, or else from the OCR file of TextVQA itself.

    Args:
        folder: Folder of the data set.
        with_ocr: Whether the words stand in the prompt.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    path = folder / ANSWERS
    # Only what is needed: the file describes the images at length.
    wanted = ("image_id", "question", "answers")
    entries = converted(
        path, stream(path, "data"), lambda entry: {key: entry[key] for key in wanted}
    )
    questions = _questions(folder, entries, with_ocr=with_ocr)
    images = image_folder(folder, "train_images")

    def document(entry: tuple[Mapping[str, Any], str]) -> Document:
        about, question = entry
        answers = [shared(answer) for answer in about["answers"]]
        if len(answers) != ANNOTATORS:
            raise ValueError(f"{len(answers)} answers, {ANNOTATORS} were expected")
        image = shared(about["image_id"])
        return Document(
            image=shared(image_file(images, f"{image}.jpg")),
            image_id=image,
            prompt=prompts.short_answer(question),
            target=max(answers, key=answers.count),
            extra={"answers": answers},
        )

    return converted(path, zip(entries, questions, strict=True), document)


def _questions(folder: Path, entries: list[dict[str, Any]], *, with_ocr: bool) -> list[str]:
    prepared = first_file(folder, *LLAVA_OCR)
    if prepared.is_file():
        asked = _llava_questions(prepared, entries)
        return asked if with_ocr else [prompts.without_ocr(question) for question in asked]
    plain = [str(entry["question"]) for entry in entries]
    if not with_ocr:
        return plain
    words = _rosetta_words(folder)
    path = folder / ROSETTA_OCR
    return converted(
        path,
        zip(plain, entries, strict=True),
        lambda pair: prompts.with_ocr(pair[0], words[pair[1]["image_id"]]),
    )


def _llava_questions(path: Path, entries: list[dict[str, Any]]) -> list[str]:
    """Read the texts of LLaVA's file, which stand in the order of the answers."""
    texts = converted(path, read_lines(path), lambda line: str(line["text"]))
    if len(texts) != len(entries):
        raise bad_layout(path, f"{len(texts)} questions, {ANSWERS} has {len(entries)}")

    def question(pair: tuple[str, dict[str, Any]]) -> str:
        # The file ends each text with the instruction, which is added to every question.
        text = pair[0].removesuffix("\n").removesuffix(prompts.SHORT_ANSWER)
        plain = prompts.without_ocr(text)
        if _plain(plain) != _plain(str(pair[1]["question"])):
            raise ValueError(f"the question is {plain!r}, in {ANSWERS} {pair[1]['question']!r}")
        return text

    return converted(path, zip(texts, entries, strict=True), question)


def _rosetta_words(folder: Path) -> dict[str, list[str]]:
    path = folder / ROSETTA_OCR
    if not path.is_file():
        raise DataError(
            f"folder {folder} holds no words read by OCR: neither {LLAVA_OCR[0]} nor "
            f"{ROSETTA_OCR}.",
            REMEDY,
        )
    return dict(
        converted(
            path,
            stream(path, "data"),
            lambda entry: (entry["image_id"], [shared(word) for word in entry["ocr_tokens"]]),
        )
    )


def _plain(question: str) -> str:
    return " ".join(question.lower().split())
