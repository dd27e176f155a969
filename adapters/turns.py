"""Conversations in the schema of LLaVA's mixture, as every adapter's training samples need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kuea_mllm.errors import DataError

IMAGE_TAG = "<image>"
# Of a training sample: what stands for the image, and where nothing is to be predicted.
IMAGE_PLACEHOLDER = -200
IGNORED = -100

_SPEAKERS = ("human", "gpt")


def alternating_turns(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the turns of a record, without an answer that comes before the first question.

    Raises:
        DataError: If they do not alternate, or someone unknown speaks; names the record.
    """
    turns: Sequence[Mapping[str, Any]] = record["conversations"]
    if turns and turns[0]["from"] != _SPEAKERS[0]:
        turns = turns[1:]
    for number, turn in enumerate(turns):
        expected = _SPEAKERS[number % 2]
        if turn["from"] != expected:
            raise DataError(
                f"record {record.get('id')!r}: turn {number + 1} is from {turn['from']!r}, where "
                f"{expected!r} has to speak.",
                "Find all such records with `kuea-mllm doctor --data FILE`.",
            )
    return turns
