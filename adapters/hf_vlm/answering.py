"""The token that an answer begins with, where the model's own chat template puts the answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kuea_mllm.adapters.choosing import WRITE_INSTEAD, candidate_tokens
from kuea_mllm.errors import UserError

LOGGER = logging.getLogger("kuea_mllm")

_QUESTION = {"role": "user", "content": [{"type": "text", "text": "What is it?"}]}
_WORD = "Answer"
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": _WORD}]}


def answer_tokens(processor: Any, candidates: Sequence[str], where: str) -> list[int]:
    """Return the token that each candidate is behind the prompt.

    Behind "Assistant:" an answer begins with a blank, which most vocabularies make a part of its
    token; behind a line break it does not.

    Args:
        processor: The model's. Where its chat template does not show an answer behind the prompt,
            candidates are read as they stand alone.
        candidates: At least one.
        where: What to call the model in messages.

    Raises:
        UserError: If something else is said before an answer; or naming a candidate that is no
            single token, or shares its token with another.
    """
    prompt, before = _up_to_answer(processor, where)
    if before.strip():
        raise UserError(
            f"the chat template of {where} puts {before.strip()!r} before an answer, so the first "
            "new token is not the answer's.",
            WRITE_INSTEAD,
        )
    return candidate_tokens(processor.tokenizer, candidates, before=before, prompt=prompt)


def _up_to_answer(processor: Any, where: str) -> tuple[str, str]:
    """Return a prompt, and what the template writes between it and an answer."""
    try:
        prompt = str(processor.apply_chat_template([_QUESTION], add_generation_prompt=True))
        answered = str(processor.apply_chat_template([_QUESTION, _ANSWER]))
    # The template is a program of the model's, and one for single questions may refuse answers.
    except Exception as error:
        LOGGER.info("The chat template of %s takes no answers (%s).", where, error)
        return "", ""
    before, word, _ = answered.removeprefix(prompt).partition(_WORD)
    if not answered.startswith(prompt) or not word:
        LOGGER.info("The chat template of %s does not show how an answer begins.", where)
        return "", ""
    return prompt, before
