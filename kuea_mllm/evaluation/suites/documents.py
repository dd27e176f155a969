"""One question of a suite, its row in the file that lmms-eval reads, and what a task asks of it.

The functions that take a row are named in task files by `!function`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kuea_mllm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

JSON = Any
"""What JSON can hold."""

Row = Mapping[str, Any]
"""A document as lmms-eval hands it back; fields that a data set lacks may be None."""

REMEDY = "docs/evaluation.md lists the files that the folder of each data set has to hold."


@dataclass(frozen=True, slots=True)
class Document:
    """One question about one image.

    Attributes:
        image: Absolute path of the image.
        image_id: What documents that depend on each other share: the image, or MMVP's pair.
        prompt: What the user says, without the image tag.
        target: The right answer as it is shown; for choices the right candidate.
        candidates: What may be answered, where the answer is chosen by its first token.
        group: Part of the data set that has a score of its own.
        unit: What documents that must be sampled together share; None samples it alone.
        extra: What scoring or judging needs besides.
    """

    image: str
    image_id: str
    prompt: str
    target: str
    candidates: tuple[str, ...] = ()
    group: str | None = None
    unit: str | None = None
    extra: Mapping[str, JSON] = field(default_factory=dict)


def document_row(document: Document) -> dict[str, Any]:
    """Return the document as one JSON row; fields that are empty are left out.

    Empty lists have no type in a table, and one of nothing but nulls is of no use.
    """
    row: dict[str, Any] = {
        "image": document.image,
        "image_id": document.image_id,
        "prompt": document.prompt,
        "target": document.target,
    }
    optional = {
        "candidates": list(document.candidates),
        "group": document.group,
        "unit": document.unit,
        "extra": dict(document.extra),
    }
    return row | {name: value for name, value in optional.items() if value}


def to_visual(row: Row) -> list[Picture]:
    """Open the image of a row as RGB.

    Raises:
        DataError: Naming the file, if it cannot be decoded or is not the image that the boxes of
            the data set were drawn on.
    """
    from PIL import Image

    from kuea_mllm.evaluation.answering.preparing import strict_image_files

    path = str(row["image"])
    try:
        with strict_image_files(), Image.open(path) as file:
            picture = file.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist.", REMEDY) from None
    # PIL's decoders fail in many ways.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"image {path} cannot be decoded: {reason}.", "Get it again.") from error
    extra = row.get("extra") or {}
    stated = (extra.get("width"), extra.get("height"))
    if None not in stated and stated != picture.size:
        raise DataError(
            f"image {path} has {picture.width} x {picture.height} pixels, the annotations say "
            f"{stated[0]} x {stated[1]}.",
            "Use the original image: boxes cannot be compared on another.",
        )
    return [picture]


def to_text(row: Row) -> str:
    """Return the prompt of a row."""
    return str(row["prompt"])


def to_target(row: Row) -> str:
    """Return the right answer of a row."""
    return str(row["target"])


def require_images(documents: Sequence[Document], dataset: str) -> None:
    """Make sure that all images are there; each is looked for once.

    Args:
        documents: Documents of one data set.
        dataset: What to call it in the error.

    Raises:
        DataError: Naming the first image that is missing.
    """
    paths = dict.fromkeys(document.image for document in documents)
    # Path.is_file raises where a folder may not be looked into, or a name is too long.
    missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113
    if missing:
        others = f", nor do {len(missing) - 1} others of {len(paths)}" if len(missing) > 1 else ""
        raise DataError(f"data set {dataset}: image {missing[0]} does not exist{others}.", REMEDY)


def shared(text: object) -> str:
    """Return the text, kept once: paths and answers of large data sets repeat."""
    return sys.intern(str(text))
