"""Readers of the original annotation files: Karpathy's JSON, the VQA format, HatefulMemes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.fewshot.examples import Example

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
    content = _read(path)

    def example(image: Mapping[str, Any]) -> Example:
        where = image["filepath"] if images is None else images
        name = str(image["filename"])
        number = image.get("cocoid", image.get("imgid", name))
        captions = tuple(str(sentence["raw"]) for sentence in image["sentences"])
        if not captions:
            raise DataError(f"file {path}: image {name} has no sentences.")
        return Example(str(folder / where / name), str(number), captions=captions)

    return _converted(path, lambda: [example(i) for i in content["images"] if i["split"] == part])


def read_vqa(folder: Path, part: Part, *, files: VqaFiles) -> list[Example]:
    """Read questions and answers in VQA format; the training part gives demonstrations.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    name = "train" if part == "train" else "val"
    questions = folder / files.questions.format(part=name)
    annotations = folder / files.annotations.format(part=name)
    asked, answered = _read(questions), _read(annotations)
    answers = _converted(
        annotations, lambda: {a["question_id"]: a["answers"] for a in answered["annotations"]}
    )

    def example(question: Mapping[str, Any]) -> Example:
        number, image = question["question_id"], question["image_id"]
        if not answers.get(number):
            raise DataError(f"file {annotations} has no answers to question {number}.")
        given = answers[number]
        return Example(
            image=str(folder / files.image.format(part=name, id=image)),
            image_id=str(image),
            question=str(question["question"]),
            answers=tuple(str(answer["answer"]) for answer in given),
            # `index` compares all fields, which tells identical annotations from numbered ones.
            entries=tuple(given.index(answer) for answer in given),
        )

    return _converted(questions, lambda: [example(q) for q in asked["questions"]])


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
    content = _read(path)
    return _converted(
        path,
        lambda: [
            (str(answer["raw_answer"]), str(answer["answer"]))
            for annotation in content["annotations"]
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
    return _parsed(path, lambda text: [json.loads(line) for line in text.splitlines() if line])


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"file {path} does not exist.",
            "See docs/fewshot.md for the files that a data set's folder has to hold.",
        ) from None
    except (ValueError, OSError) as error:
        raise DataError(f"file {path} cannot be read: {' '.join(str(error).split())}.") from error


def _converted(path: Path, convert: Callable[[], T]) -> T:
    try:
        return convert()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"key {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"file {path} is not laid out as expected: {problem}.",
            "It has to be the file that the data set's authors publish.",
        ) from error
