"""Answers that are one token each, and the likeliest of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kuea_mllm.errors import UserError

WRITE_INSTEAD = "Let the model write its answer instead: --protocol lmms-eval."


def candidate_tokens(
    tokenizer: Any, candidates: Sequence[str], *, before: str = "", prompt: str = ""
) -> list[int]:
    """Return the token of each candidate.

    Args:
        tokenizer: The model's.
        candidates: At least one.
        before: What stands between the prompt and an answer, as the blank that a prompt lacks.
        prompt: What stands before that: vocabularies may write the beginning of a text otherwise
            than what follows. Without influence where it would merge with the answer.

    Raises:
        UserError: Naming a candidate that is no single token, or shares its token with another.
    """
    if not candidates:
        raise UserError("there are no candidates to choose from.")
    tokens: dict[int, str] = {}
    head = token_ids(tokenizer, prompt) if prompt else []
    for candidate in candidates:
        ids = token_ids(tokenizer, prompt + before + candidate)
        is_apart = ids[: len(head)] == head
        ids = ids[len(head) :] if is_apart else token_ids(tokenizer, before + candidate)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if len(ids) != 1 or ids[0] == unknown:
            raise UserError(
                f"candidate {candidate!r} is not one token of this model's vocabulary but "
                f"{tokenizer.convert_ids_to_tokens(ids)}, so its probability is not that of the "
                "first new token.",
                WRITE_INSTEAD,
            )
        if ids[0] in tokens:
            raise UserError(
                f"candidates {tokens[ids[0]]!r} and {candidate!r} are the same token of this "
                "model's vocabulary.",
                WRITE_INSTEAD,
            )
        tokens[ids[0]] = candidate
    return list(tokens)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, without those that a tokenizer adds around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def likeliest(logits: Tensor, candidates: Sequence[str]) -> list[str]:
    """Return the candidate with the highest logit of each row.

    The softmax over the candidates keeps their order, so it is left out.

    Args:
        logits: Of the candidates' tokens, (rows, candidates).
        candidates: In the same order.
    """
    return [candidates[int(place)] for place in logits.float().argmax(dim=-1)]
