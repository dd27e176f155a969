"""Readers of the original annotation files: Karpathy's JSON, the VQA format, HatefulMemes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.fewshot.examples import Example
from kuea_mllm.evaluation.fewshot.json_stream import DAMAGED, stream_entries
from kuea_mllm.evaluation.fewshot.vqa_accuracy import normalise_answer

T = TypeVar("T")
Part = Literal["train", "test"]
"""Demonstrations come from `train`, questions from `test`, whatever a data set calls them."""

# HatefulMemes: the first release and its second phase name the same 500 memes differently.
_MEMES = {
    "train": ("train.jsonl", "train.json"),
    "test": ("dev.jsonl", "dev_seen.jsonl", "dev.json"),
}


@dataclass(frozen=True)
class VqaFiles:
    """Names inside the folder of a data set in VQA format; `{part}` is train or val.

    Attributes:
        questions: File of the questions.
        annotations: File of the answers.
        image: Image of `{id}`.
    """

    questions: str
    annotations: str
    image: str


def read_karpathy(
    folder: Path, part: Part, *, file: str, images: str | None = None
) -> list[Example]:
    """Read a split of Karpathy's JSON; `restval` belongs to neither part.

    Args:
        folder: Folder of the data set.
        part: Which split.
        file: Name of the JSON file.
        images: Folder of the images; None takes each image's `filepath`.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    path = folder / file

    def example(image: Mapping[str, Any]) -> Example:
        where = image["filepath"] if images is None else images
        name = str(image["filename"])
        number = image.get("cocoid", image.get("imgid", name))
        captions = tuple(str(sentence["raw"]) for sentence in image["sentences"])
        if not captions:
            raise DataError(f"file {path}: image {name} has no sentences.")
        return Example(str(folder / where / name), str(number), captions=captions)

    return _converted(
        path,
        lambda: [example(i) for i in stream_entries(path, "images") if i["split"] == part],
    )


def read_vqa(folder: Path, part: Part, *, files: VqaFiles) -> list[Example]:
    """Read questions and answers in VQA format; the training part gives demonstrations.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    name = "train" if part == "train" else "val"
    questions = folder / files.questions.format(part=name)
    annotations = folder / files.annotations.format(part=name)
    # Of VQAv2 each part has millions of annotations: parsed one at a time, texts kept once.
    answers = _converted(
        annotations,
        lambda: {
            a["question_id"]: _read_answers(a["answers"])
            for a in stream_entries(annotations, "annotations")
        },
    )

    def example(question: Mapping[str, Any]) -> Example:
        number, image = question["question_id"], question["image_id"]
        given, entries = answers.get(number, ((), ()))
        if not given:
            raise DataError(f"file {annotations} has no answers to question {number}.")
        return Example(
            image=sys.intern(str(folder / files.image.format(part=name, id=image))),
            image_id=sys.intern(str(image)),
            question=str(question["question"]),
            answers=given,
            entries=entries,
        )

    return _converted(
        questions, lambda: [example(q) for q in stream_entries(questions, "questions")]
    )


def _read_answers(given: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the answers to a question, and for each the place of the first that is the same."""
    answers = tuple(sys.intern(str(answer["answer"])) for answer in given)
    if len({str(answer.get("answer_id")) for answer in given}) == len(given):
        return answers, _places(len(given))
    # The published scorer writes the normalised answers back before it compares annotations, so
    # that "2" and "two" of equally sure annotators are the same one.
    seen: dict[Any, int] = {}
    kinds = (
        (_normalised(text), repr(sorted((k, v) for k, v in answer.items() if k != "answer")))
        for text, answer in zip(answers, given, strict=True)
    )
    return answers, tuple(seen.setdefault(kind, place) for place, kind in enumerate(kinds))


_normalised = lru_cache(maxsize=1 << 16)(normalise_answer)


@lru_cache(maxsize=64)
def _places(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def read_hateful_memes(folder: Path, part: Part) -> list[Example]:
    """Read `train.jsonl` or `dev.jsonl` (also `dev_seen.jsonl`, and JSON with `annotations`).

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    names = _MEMES[part]
    path = next((folder / n for n in names if (folder / n).is_file()), folder / names[0])
    rows = _read_lines(path) if path.suffix == ".jsonl" else _read(path)["annotations"]

    def example(row: Mapping[str, Any]) -> Example:
        image, label = folder / str(row["img"]), int(row["label"])
        if label not in (0, 1):
            raise ValueError(f"label {label} of {row['img']}, 0 or 1 was expected")
        return Example(str(image), image.name, question=str(row["text"]), label=label)

    return _converted(path, lambda: [example(row) for row in rows])


def read_stem_pairs(path: Path) -> list[tuple[str, str]]:
    """Read the raw and the stemmed form of every answer of OK-VQA's annotations.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    return _converted(
        path,
        lambda: [
            (sys.intern(str(answer["raw_answer"])), sys.intern(str(answer["answer"])))
            for annotation in stream_entries(path, "annotations")
            for answer in annotation["answers"]
        ],
    )


def require_images(examples: Sequence[Example], source: str) -> None:
    """Make sure that all images are there.

    Raises:
        DataError: Naming the first one that is missing.
    """
    paths = dict.fromkeys(example.image for example in examples)
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise DataError(
            f"{source}: image {missing[0]} does not exist"
            + (f", nor do {len(missing) - 1} others." if len(missing) > 1 else "."),
            "See docs/fewshot.md for where each data set is expected to have its images.",
        )


def _read(path: Path) -> Any:
    return _parsed(path, json.loads)


def _read_lines(path: Path) -> Any:
    # Not `splitlines`: texts may hold other line separators.
    return _parsed(path, lambda text: [json.loads(x) for x in text.split("\n") if x.strip()])


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"file {path} does not exist.",
            "See docs/fewshot.md for the files that a data set's folder has to hold.",
        ) from None
    except OSError as error:
        raise DataError(f"file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"file {path} cannot be read: {reason} ({DAMAGED}).") from error


def _converted(path: Path, convert: Callable[[], T]) -> T:
    try:
        return convert()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"key {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"file {path} is not laid out as expected: {problem}.",
            "It has to be the file that the data set's authors publish.",
        ) from error
