"""One example of a data set, and its form in the files that lmms-eval reads."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """An image with what is known about it; fields of other data sets stay empty.

    Attributes:
        image: Path of the image.
        image_id: What examples about the same image share.
        question: The question, or the text that is written on a meme.
        answers: Annotated answers in their order.
        entries: For each answer the place of the first annotation that is the same in all its
            fields, the answer being normalised; its own place wherever annotations are numbered.
        captions: Reference captions, the first one first.
        label: Class of a meme.
    """

    image: str
    image_id: str
    question: str = ""
    answers: tuple[str, ...] = ()
    entries: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()
    label: int | None = None


def example_row(example: Example) -> dict[str, Any]:
    """Return the fields that hold something; empty lists have no type in a table."""
    values = ((field.name, getattr(example, field.name)) for field in fields(Example))
    return {name: value for name, value in values if value not in ((), None)}


def read_examples(path: Path) -> dict[int, Example]:
    """Read examples back by their `number`."""
    known = {field.name for field in fields(Example)}
    found: dict[int, Example] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            values: dict[str, Any] = {
                name: tuple(map(_shared, value)) if isinstance(value, list) else _shared(value)
                for name, value in row.items()
                if name in known
            }
            found[int(row["number"])] = Example(**values)
    return found


def _shared(value: Any) -> Any:
    # Millions of annotated answers are few different texts.
    return sys.intern(value) if isinstance(value, str) else value
