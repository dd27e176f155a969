"""The published prompts, character for character: no blank after `<image>` or a colon."""

from __future__ import annotations

from collections.abc import Sequence

from kuea_mllm.evaluation.fewshot.datasets import CLASS_NAMES, Style
from kuea_mllm.evaluation.fewshot.examples import Example

IMAGE = "<image>"
END = "<|endofchunk|>"
TEXT_ONLY_SHOTS = 2
"""Demonstrations that a zero-shot prompt shows, without their images."""

# A newline stands behind each demonstration, but not in memes.
_SEPARATORS: dict[Style, str] = {"caption": "\n", "vqa": "\n", "hateful": ""}


def demonstration(style: Style, example: Example) -> str:
    """Write a solved example, up to and including its end token."""
    return question(style, example) + _answer(style, example) + END


def question(style: Style, example: Example) -> str:
    """Write an example up to where its answer goes."""
    if style == "caption":
        return f"{IMAGE}Output:"
    if style == "vqa":
        return f"{IMAGE}Question:{example.question} Short answer:"
    return f"{IMAGE}is an image with: '{example.question}' written on it. Is it hateful? Answer:"


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
    separator = _SEPARATORS[style]
    context = "".join(demonstration(style, example) + separator for example in shown)
    if not with_images:
        context = context.replace(IMAGE, "")
    return context + question(style, asked)


def _answer(style: Style, example: Example) -> str:
    if style == "caption":
        return example.captions[0].strip()
    if style == "vqa":
        return example.answers[0]
    return CLASS_NAMES[example.label or 0]
