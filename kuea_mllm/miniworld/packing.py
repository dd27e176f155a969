"""Several questions about one picture in one sequence, each blind to the others.

Every question sees the prompt's beginning and the image, and itself; its positions go on from the
image's last. The result for each is what a conversation with this single question would give, for
a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kuea_mllm.miniworld.prompts import after_image, before_image
from kuea_mllm.miniworld.questions import Question
from kuea_mllm.miniworld.scenes import GRID

if TYPE_CHECKING:
    from transformers import LlamaTokenizer

_PATCHES = GRID * GRID
_NO_TARGET = -100


@dataclass(frozen=True)
class EncodedQuestion:
    """Token ids of one question: what follows the image, and the answer with its end."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """Questions of several pictures, one row for each picture.

    Attributes:
        input_ids: (pictures, length); zeros stand where the image goes.
        position_ids: (pictures, length).
        mask: Whether a token sees another, bool, (pictures, 1, length, length).
        is_answer: Whether a position predicts an answer token, bool, (pictures, length).
        targets: The token that each position predicts, or -100.
        hints: For the tokens of a question, the first token of its answer, else -100.
        image_start: First position of the image.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    is_answer: Tensor
    targets: Tensor
    hints: Tensor
    image_start: int

    @property
    def is_prompt(self) -> Tensor:
        """Whether a position belongs to a question, bool, (pictures, length)."""
        return self.hints != _NO_TARGET


class QuestionPacker:
    """Tokenizes questions and packs them.

    Args:
        tokenizer: The LLaVA's tokenizer. The pieces around the image are tokenized on their own,
            as LLaVA does.
    """

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self._tokenizer = tokenizer
        self._prefix = tokenizer.encode(before_image())
        self._pieces = cache(self._tokenize)

    def encode(self, question: Question) -> EncodedQuestion:
        """Tokenize a question and its answer."""
        return EncodedQuestion(
            prompt=self._pieces(after_image(question.prompt)),
            answer=(*self._pieces(question.answer), self._tokenizer.eos_token_id),
        )

    def pack(self, pictures: Sequence[Sequence[EncodedQuestion]]) -> PackedBatch:
        """Pack the questions of every picture into one row each."""
        shared = len(self._prefix) + _PATCHES
        lengths = [
            sum(len(item.prompt) + len(item.answer) for item in questions) for questions in pictures
        ]
        size = (len(pictures), shared + max(lengths))
        input_ids = torch.zeros(size, dtype=torch.long)
        positions = torch.zeros(size, dtype=torch.long)
        targets = torch.full(size, _NO_TARGET)
        hints = torch.full(size, _NO_TARGET)
        # Which question a token belongs to: 0 the shared beginning, -1 padding.
        owner = torch.full(size, -1)
        input_ids[:, : len(self._prefix)] = torch.tensor(self._prefix)
        positions[:, :shared] = torch.arange(shared)
        owner[:, :shared] = 0
        for row, questions in enumerate(pictures):
            ids: list[int] = []
            places: list[int] = []
            owners: list[int] = []
            predicted: list[int] = []
            hinted: list[int] = []
            for number, item in enumerate(questions, start=1):
                tokens = item.prompt + item.answer
                ids += tokens
                places += range(shared, shared + len(tokens))
                owners += [number] * len(tokens)
                predicted += [_NO_TARGET] * (len(item.prompt) - 1)
                predicted += [*item.answer, _NO_TARGET]
                hinted += [item.answer[0]] * len(item.prompt) + [_NO_TARGET] * len(item.answer)
            end = shared + len(ids)
            input_ids[row, shared:end] = torch.tensor(ids)
            positions[row, shared:end] = torch.tensor(places)
            owner[row, shared:end] = torch.tensor(owners)
            targets[row, shared:end] = torch.tensor(predicted)
            hints[row, shared:end] = torch.tensor(hinted)
        return PackedBatch(
            input_ids=input_ids,
            position_ids=positions,
            mask=_block_mask(owner),
            is_answer=targets != _NO_TARGET,
            targets=targets,
            hints=hints,
            image_start=len(self._prefix),
        )

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


def _block_mask(owner: Tensor) -> Tensor:
    length = owner.shape[1]
    is_past = torch.ones(length, length, dtype=torch.bool).tril()
    is_visible = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)
    # Padding sees itself, as a row without any visible token would give NaN.
    return ((is_visible & is_past) | torch.eye(length, dtype=torch.bool))[:, None]
