"""Training samples of LLaVA-1.5: token ids and labels as the original makes them.

The original finds the supervised part of a conversation by counting: every round is tokenized once
more on its own, and where the counts do not add up to the length of the whole, the sample is left
without any label. That happens (an empty answer, a turn with " ASSISTANT: " in it), so the counting
is repeated here instead of marking the answers directly; see the fact sheet, section 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from kuea_mllm.adapters.llava.prompt import IMAGE_TAG, SYSTEM, TURN_END, check_tokenizer
from kuea_mllm.adapters.turns import IGNORED, IMAGE_PLACEHOLDER, alternating_turns
from kuea_mllm.errors import EnvironmentFailure, UserError

__all__ = [
    "IGNORED",
    "IMAGE_PLACEHOLDER",
    "EncodedConversation",
    "LlavaConversations",
    "build_conversation",
    "encode_conversation",
]

_ROLES = ("USER", "ASSISTANT")
_ANSWER_BEGINS = f" {_ROLES[1]}: "
# What "ASSISTANT: " without an answer takes, which counting leaves to the answer.
_ANSWER_MARGIN = 2
# Behind the vocabulary in converted models; in the original these are words like any other.
_OURS = (IMAGE_TAG, "<pad>")


class EncodedConversation(NamedTuple):
    """One sample.

    Attributes:
        input_ids: Token ids, with `IMAGE_PLACEHOLDER` once for the image.
        labels: What to predict, `IGNORED` where nothing is.
        warning: Why the sample has no labels at all, in the original's words; empty otherwise.
        left_out: Tokens that were cut off. Only text is cut here: a sample with an image is cut
            when its batch is made.
    """

    input_ids: list[int]
    labels: list[int]
    warning: str
    left_out: int


class LlavaConversations:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: Llama tokenizer of transformers, legacy or not.
        max_length: Longest sample in tokens, the image counted as one.
        where: Where the tokenizer comes from, for messages.

    Raises:
        UserError: If the tokenizer follows another conversation format, or knows no token to pad
            with.
    """

    placeholder = IMAGE_PLACEHOLDER

    def __init__(self, tokenizer: Any, *, max_length: int, where: str = "the model") -> None:
        check_tokenizer(tokenizer, where)
        self.tokenizer = tokenizer
        self.max_length = max_length
        # The original pads with the unknown token.
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = tokenizer.unk_token_id if pad is None else pad
        if self.pad_token_id is None:
            raise UserError(
                f"the tokenizer in {where} has neither a padding token nor an unknown token.",
                'Set "pad_token" in tokenizer_config.json; LLaVA-1.5 uses "<unk>" or "<pad>".',
            )
        known = tokenizer.get_vocab()
        self._own_words = [word for word in _OURS if known.get(word, -1) >= tokenizer.vocab_size]
        self._plain: Any = None
        # Alone, a later round begins with the space token that it lacks behind "</s>". The original
        # takes off one token where `legacy` is false, which is right for Llama's vocabulary alone,
        # and that setting does not survive saving: so it is measured.
        probe = f"{_ROLES[0]}: a"
        behind_turn = self._ids(f"{TURN_END}{probe}")[1:]
        self._surplus = len(self._ids(probe)) - len(behind_turn)

    def encode(self, record: Mapping[str, Any]) -> EncodedConversation:
        """Encode a record in the schema of LLaVA's mixture.

        Args:
            record: `conversations`, and `image` if it has one.

        Raises:
            DataError: If its turns do not alternate; names the record.
        """
        has_image = record.get("image") is not None
        prompt = build_conversation(record)
        # A sequence longer than this is cut for text at once, with an image later.
        ids = self._tokenize(prompt, has_image)
        left_out = 0 if has_image else max(0, len(ids) - self.max_length)
        ids = ids[: len(ids) - left_out]
        labels, warning = self._labels(prompt, ids, has_image)
        return EncodedConversation(ids, labels, warning, left_out)

    def _labels(self, prompt: str, ids: list[int], has_image: bool) -> tuple[list[int], str]:
        labels = [IGNORED] * len(ids)
        # Unknown tokens stood for padding in the original, so it did not count them.
        length = sum(token != self.tokenizer.unk_token_id for token in ids)
        at = 1
        for number, text in enumerate(prompt.split(TURN_END)):
            instruction, found, rest = text.partition(_ANSWER_BEGINS)
            if not found or _ANSWER_BEGINS in rest:
                break
            taken = len(self._tokenize(text, has_image))
            asked = len(self._tokenize(instruction + found, has_image)) - _ANSWER_MARGIN
            if number:
                taken, asked = taken - self._surplus, asked - self._surplus
            labels[at + asked : at + taken] = ids[at + asked : at + taken]
            at += taken
        if at < self.max_length and at != length:
            warning = f"WARNING: tokenization mismatch: {at} vs. {length}. (ignored)"
            return [IGNORED] * len(ids), warning
        return labels, ""

    def _tokenize(self, text: str, has_image: bool) -> list[int]:
        ids: list[int] = [self.tokenizer.bos_token_id]
        # In text alone a tag is just text, which the original's tokenizer takes apart.
        for number, piece in enumerate(text.split(IMAGE_TAG) if has_image else [text]):
            ids += [IMAGE_PLACEHOLDER] if number else []
            ids += self._ids(piece)
        return ids

    def _ids(self, text: str) -> list[int]:
        if any(word in text for word in self._own_words):
            return self._ids_of_plain_words(text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _ids_of_plain_words(self, text: str) -> list[int]:
        if self._plain is None:
            self._plain = _without_tokens(self.tokenizer, self._own_words)
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plain": None}


def encode_conversation(
    record: Mapping[str, Any], tokenizer: Any, *, max_length: int
) -> EncodedConversation:
    """Encode one record; for many, make a `LlavaConversations` once."""
    return LlavaConversations(tokenizer, max_length=max_length).encode(record)


def build_conversation(record: Mapping[str, Any]) -> str:
    """Return the prompt of a whole conversation ("v1"), tags still as text.

    With an image, its tag is moved to the front of its turn; an answer before the first question is
    left out.

    Raises:
        DataError: If the turns do not alternate, or someone unknown speaks; names the record.
    """
    prompt = f"{SYSTEM} "
    for number, turn in enumerate(alternating_turns(record)):
        side = number % 2
        text = turn["value"]
        if record.get("image") is not None and IMAGE_TAG in text:
            text = f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()
        # A turn without text lacks its end as well.
        prompt += f"{_ROLES[side]}: {text}{(' ', TURN_END)[side]}" if text else f"{_ROLES[side]}:"
    return prompt


def _without_tokens(tokenizer: Any, words: list[str]) -> Any:
    """Return the tokenizer for which some added tokens are words like any other."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in words]
    plain: Any = Tokenizer.from_str(json.dumps(content))
    for token in content["added_tokens"]:
        if plain.token_to_id(token["content"]) != token["id"]:
            raise EnvironmentFailure(
                f"without {', '.join(words)} the tokenizer gives {token['content']!r} another id.",
                "A text of the data holds one of these words; take the record out.",
            )
    return plain
