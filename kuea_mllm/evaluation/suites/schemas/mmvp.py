"""MMVP: pairs of images that CLIP takes for the same, with one question and two answers.

The answers are those of the authors' `Questions.csv`, as in the paper. Those of four questions
(99, 100, 279, 280) were found to be wrong later and are corrected in the copy that lmms-eval uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from kuea_mllm.evaluation.suites import prompts
from kuea_mllm.evaluation.suites.documents import Document
from kuea_mllm.evaluation.suites.schemas.reading import bad_layout, converted, read_table

_OPTION = re.compile(r"\(([a-z])\)\s*")


def read_mmvp(folder: Path) -> list[Document]:
    """Read the questions; 2k-1 and 2k are a pair.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    path = folder / "Questions.csv"
    rows = read_table(path, ("Index", "Question", "Options", "Correct Answer"))
    documents = converted(path, rows, lambda row: _document(folder, row))
    numbers = sorted(int(row["Index"]) for row in rows)
    if numbers != list(range(1, len(rows) + 1)) or len(rows) % 2:
        raise bad_layout(path, "the questions are not numbered 1, 2, .. to the end of a pair")
    return documents


def split_options(text: str) -> dict[str, str]:
    """Return the options of a text like "(a) Open (b) Closed" by their letters."""
    parts = _OPTION.split(text)
    return {letter: option.strip() for letter, option in zip(parts[1::2], parts[2::2], strict=True)}


def _document(folder: Path, row: Mapping[str, str]) -> Document:
    number, options = int(row["Index"]), split_options(row["Options"])
    right = row["Correct Answer"].strip().strip("()").lower()
    if len(options) < 2 or right not in options:
        raise ValueError(
            f"answer {row['Correct Answer']!r} is none of the options {row['Options']!r}"
        )
    pair = f"pair {(number + 1) // 2}"
    return Document(
        image=str(folder / "MMVP Images" / f"{number}.jpg"),
        image_id=pair,
        prompt=prompts.mmvp(row["Question"], row["Options"]),
        target=f"({right})",
        unit=pair,
        extra={"letters": list(options), "options": list(options.values())},
    )
