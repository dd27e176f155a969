"""What the paper's evaluation asks, character for character (Prismatic's harness, MMVP, LLaVA).

The image comes before, as `<image>` and a line break; that is the model's affair.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
BY_LETTER = "\nAnswer with the option's letter from the given choices directly."
OCR_MARK = "\nReference OCR token:"
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
COUNTS = tuple(str(count) for count in range(16))
"""The answers to a counting question, as the choices A to P."""


def short_answer(question: str) -> str:
    """Ask for a word or a phrase."""
    return f"{question}{SHORT_ANSWER}"


def by_letter(question: str, choices: Sequence[str]) -> str:
    """Ask for the letter of one of the choices.

    Raises:
        ValueError: If there are more choices than letters.
    """
    listed = "\n".join(
        f"{letter}. {choice}"
        for letter, choice in zip(LETTERS[: len(choices)], choices, strict=True)
    )
    return f"{question}\n{listed}{BY_LETTER}"


def true_or_false(statement: str) -> str:
    """Ask whether a statement about the image is true."""
    return (
        f'Based on the image, is this statement "True" or "False"? {statement}\n'
        'Respond with "True" or "False" directly.'
    )


def locate(expression: str) -> str:
    """Ask for the box of what an expression refers to."""
    return (
        "Please provide the bounding box coordinate of the region this sentence describes: "
        f'"{expression}"'
    )


def with_ocr(question: str, tokens: Sequence[str]) -> str:
    """Add the words that were read off the image to a question."""
    return f"{question}{OCR_MARK} {', '.join(tokens)}"


def without_ocr(question: str) -> str:
    """Return the part of a question before the words that were read off the image."""
    return question.split(OCR_MARK, maxsplit=1)[0]


def mmvp(question: str, options: str) -> str:
    """Ask as MMVP's script does; `options` is the text of its file, "(a) .. (b) .."."""
    return f"{question} {options}"
