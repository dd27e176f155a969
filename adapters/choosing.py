"""Answers that are one token each, and the likeliest of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kuea_mllm.errors import UserError

_REMEDY = "Let the model write its answer instead: --protocol lmms-eval."


def candidate_tokens(tokenizer: Any, candidates: Sequence[str], *, before: str = "") -> list[int]:
    """Return the token of each candidate.

    Args:
        tokenizer: The model's.
        candidates: At least one.
        before: What stands between the prompt and an answer, as the blank that a prompt lacks.

    Raises:
        UserError: Naming a candidate that is no single token, or shares its token with another.
    """
    if not candidates:
        raise UserError("there are no candidates to choose from.")
    tokens: dict[int, str] = {}
    for candidate in candidates:
        ids = tokenizer(before + candidate, add_special_tokens=False)["input_ids"]
        unknown = getattr(tokenizer, "unk_token_id", None)
        if len(ids) != 1 or ids[0] == unknown:
            raise UserError(
                f"candidate {candidate!r} is not one token of this model's vocabulary but "
                f"{tokenizer.convert_ids_to_tokens(ids)}, so its probability is not that of the "
                "first new token.",
                _REMEDY,
            )
        if ids[0] in tokens:
            raise UserError(
                f"candidates {tokens[ids[0]]!r} and {candidate!r} are the same token of this "
                "model's vocabulary.",
                _REMEDY,
            )
        tokens[ids[0]] = candidate
    return list(tokens)


def likeliest(logits: Tensor, candidates: Sequence[str]) -> list[str]:
    """Return the candidate with the highest logit of each row.

    The softmax over the candidates keeps their order, so it is left out.

    Args:
        logits: Of the candidates' tokens, (rows, candidates).
        candidates: In the same order.
    """
    return [candidates[int(place)] for place in logits.float().argmax(dim=-1)]
