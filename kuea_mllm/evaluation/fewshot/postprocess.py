"""From what the model wrote to what is scored: the published cuts, nothing stripped."""

from __future__ import annotations

import re

_NEXT_QUESTION = re.compile("Question|Answer|Short")


def cut_caption(text: str) -> str:
    """Keep what stands before the next "Output", without double quotes."""
    return text.partition("Output")[0].replace('"', "")


def cut_answer(text: str) -> str:
    """Keep what stands before the next question and before the first comma with a blank."""
    return _NEXT_QUESTION.split(text, maxsplit=1)[0].partition(", ")[0]
