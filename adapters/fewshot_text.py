"""Conventions of the published few-shot evaluation that everything which prompts shares (no torch).

Here and not in `evaluation`, because the mini world, which knows no evaluation, scores by them too.
"""

from __future__ import annotations

import re

TEXT_ONLY_SHOTS = 2
"""Demonstrations that a zero-shot prompt shows, without their images."""

_NEXT_QUESTION = re.compile("Question|Answer|Short")


def cut_caption(text: str) -> str:
    """Keep what stands before the next "Output", without double quotes."""
    return text.partition("Output")[0].replace('"', "")


def cut_answer(text: str) -> str:
    """Keep what stands before the next question and before the first comma with a blank."""
    return _NEXT_QUESTION.split(text, maxsplit=1)[0].partition(", ")[0]
