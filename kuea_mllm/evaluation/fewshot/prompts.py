"""The published prompts, character for character: no blank after `<image>` or a colon."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kuea_mllm.evaluation.fewshot.datasets import CLASS_NAMES, Style
from kuea_mllm.evaluation.fewshot.examples import Example

IMAGE = "<image>"
END = "<|endofchunk|>"

# What the tokenizer takes for a special token wherever it stands in a prompt.
_SPECIAL = re.compile(r"<(image|PAD|\|endofchunk\||\|endoftext\||\|padding\|)>")

# A newline stands behind each demonstration, but not in memes.
_SEPARATORS: dict[Style, str] = {"caption": "\n", "vqa": "\n", "hateful": ""}


def plain(text: str) -> str:
    """Write special tokens in the words of a data set so that they are words: `< image>`.

    Left as they are, `<image>` would count as a place for an image and `<|endofchunk|>` would end a
    demonstration.
    """
    return _SPECIAL.sub(r"< \1>", text)


def holds_special(style: Style, example: Example, *, is_solved: bool) -> bool:
    """Say whether the words that a prompt takes from an example hold a special token."""
    words = [example.question, *([_answer(style, example)] if is_solved else [])]
    return any(map(_SPECIAL.search, words))


def demonstration(style: Style, example: Example, *, with_image: bool = True) -> str:
    """Write a solved example, up to what separates it from the next.

    Args:
        style: Which prompt.
        example: The example.
        with_image: False leaves out its image tag.
    """
    solved = question(style, example) + plain(_answer(style, example)) + END + _SEPARATORS[style]
    return solved if with_image else solved.removeprefix(IMAGE)


def question(style: Style, example: Example) -> str:
    """Write an example up to where its answer goes."""
    if style == "caption":
        return f"{IMAGE}Output:"
    words = plain(example.question)
    if style == "vqa":
        return f"{IMAGE}Question:{words} Short answer:"
    return f"{IMAGE}is an image with: '{words}' written on it. Is it hateful? Answer:"


def build_prompt(
    style: Style, shown: Sequence[Example], asked: Example, *, with_images: bool
) -> str:
    """Put demonstrations and question together.

    Args:
        style: Which prompt.
        shown: Demonstrations in their order.
        asked: The question.
        with_images: False removes the image tags of the demonstrations, as zero-shot prompts have
            it; the question keeps its own.
    """
    context = "".join(demonstration(style, example, with_image=with_images) for example in shown)
    return context + question(style, asked)


def _answer(style: Style, example: Example) -> str:
    if style == "caption":
        return example.captions[0].strip()
    if style == "vqa":
        return example.answers[0]
    return CLASS_NAMES[example.label or 0]
