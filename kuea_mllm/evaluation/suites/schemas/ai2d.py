"""AI2D: `questions/*.json`, `images/` and the list of the images that form the test set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.suites import prompts
from kuea_mllm.evaluation.suites.documents import REMEDY, Document
from kuea_mllm.evaluation.suites.schemas.reading import (
    bad_layout,
    converted,
    first_file,
    image_file,
    read_json,
)

CHOICES = prompts.LETTERS[:4]


def read_ai2d(folder: Path) -> list[Document]:
    """Read all questions about all diagrams; those of the test list are the group `test`.

    The prompt shows the choices as they are, and the original image (not `abcLabels`), as the
    paper's harness does.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    # The archive unpacks into a folder of its own, which the list does not lie in.
    root = folder if (folder / "questions").is_dir() else folder / "ai2d"
    files = sorted((root / "questions").glob("*.json"), key=_number)
    if not files:
        raise DataError(f"folder {folder / 'questions'} holds no questions (*.json).", REMEDY)
    test = _read_ids(first_file(folder, "ai2d_test_ids.csv", "ai2d/ai2d_test_ids.csv"))
    return [document for path in files for document in _read_file(root, path, test)]


def _read_file(root: Path, path: Path, test: set[int]) -> Iterator[Document]:
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise bad_layout(path, "an object was expected")
    # Some diagrams have no questions.
    questions = content.get("questions")
    if not isinstance(questions, Mapping):
        raise bad_layout(path, "key 'questions' is missing")
    if not questions:
        return
    group = "test" if _number(path) in test else "val"

    def document(entry: tuple[str, Mapping[str, Any]]) -> Document:
        question, about = entry
        choices = [str(choice) for choice in about["answerTexts"]]
        right = int(about["correctAnswer"])
        if len(choices) != len(CHOICES) or not 0 <= right < len(CHOICES):
            raise ValueError(f"{len(choices)} choices with the right one at {right}")
        name = str(content["imageName"])
        return Document(
            image=str(image_file(root / "images", name)),
            image_id=name,
            prompt=prompts.by_letter(question, choices),
            target=CHOICES[right],
            candidates=CHOICES,
            group=group,
        )

    yield from converted(path, questions.items(), document)


def _read_ids(path: Path) -> set[int]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split()
    except FileNotFoundError:
        raise DataError(f"file {path} does not exist.", REMEDY) from None
    except (OSError, ValueError) as error:
        raise bad_layout(path, " ".join(str(error).split())) from error
    return set(converted(path, lines, lambda line: int(line.split(",")[0])))


def _number(path: Path) -> int:
    stem = path.name.split(".")[0]
    if not stem.isdecimal():
        raise bad_layout(path, "its name is not the number of a diagram")
    return int(stem)
