"""What runtimes that answer by `generate` of transformers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.generation import generation_options
from kuea_mllm.adapters.prefix_sharing import SharedPrefixes
from kuea_mllm.errors import EnvironmentFailure


class AnsweringRuntime(ABC):
    """A loaded model that answers questions in batches padded on the left.

    Attributes:
        model: Of transformers, in evaluation mode, on its device.
        tokenizer: Its tokenizer.
        prefixes: What questions about one image share.
    """

    model: Any
    tokenizer: Any
    prefixes: SharedPrefixes
    # Tokens that end an answer, and those that are never one.
    _ends: Sequence[int]
    _suppressed: list[int]

    def generate(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> list[str]:
        """Answer a batch of questions; see `MLLMRuntime.generate`."""
        rows = self.generate_ids(
            requests,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def generate_ids(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> list[list[int]]:
        """Answer a batch of questions with token ids, end tokens and padding left out.

        Raises:
            UserError: If an option is out of range, or the model cannot take a question.
            EnvironmentFailure: If the device runs out of memory.
        """
        options = generation_options(max_new_tokens, num_beams, temperature, top_p)
        return self._answer(requests, options) if requests else []

    @abstractmethod
    def _answer(
        self, requests: Sequence[ChatRequest], options: Mapping[str, Any]
    ) -> list[list[int]]:
        """Answer some questions; options are those of `generate` of transformers."""

    def _go_on(self, inputs: dict[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """Return the new tokens of each row, up to where it ends."""
        if options["num_beams"] > 1 and "past_key_values" in inputs:
            # transformers repeats all the other inputs for its beams.
            inputs["past_key_values"].batch_repeat_interleave(options["num_beams"])
        output: Tensor = self.model.generate(
            **inputs, **options, suppress_tokens=self._suppressed or None
        )
        new_ids = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [_until(row, self._ends) for row in new_ids]

    @contextmanager
    def _memory_named(self, count: int) -> Iterator[None]:
        what = f"while answering {count} questions at once"
        with memory_named(self.model.device, what, forget=self.prefixes.forget):
            yield


@contextmanager
def memory_named(
    device: torch.device, what: str, *, forget: Callable[[], None] | None = None
) -> Iterator[None]:
    """Say in one line that a device has no memory left.

    Args:
        device: Where the model is.
        what: What was going on: "while answering 8 questions at once".
        forget: Lets go of what is kept for the next batch.

    Raises:
        EnvironmentFailure: If it has none.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if forget is not None:
            forget()
        raise EnvironmentFailure(
            f"out of memory on {device} {what}.",
            "Choose a smaller --batch-size, a smaller dtype or a larger device.",
        ) from error


def describe_model(model: Any) -> dict[str, Any]:
    """Return what every runtime says of how its model runs; see `MLLMRuntime.describe`."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
    }


def unwritable_tokens(tokenizer: Any, vocabulary: int, image_token: int | None) -> set[int]:
    """Return tokens that are nothing to say.

    Embeddings are padded beyond the tokenizer, and those rows can win an argmax; and a placeholder
    of an image is no word.

    Args:
        tokenizer: The model's.
        vocabulary: Rows of the output layer.
        image_token: Stands for an image, None if that is not known.
    """
    known = set(tokenizer.get_vocab().values())
    never = {token for token in range(vocabulary) if token not in known}
    if image_token is not None and image_token < vocabulary:
        never.add(image_token)
    return never


def forget_stored_settings(model: Any, **kept: Any) -> None:
    """Empty a model's settings of `generate`.

    A stored temperature or length would otherwise fill in what a call leaves open.

    Args:
        model: Changed in place.
        kept: What shall hold for all calls.
    """
    from transformers import GenerationConfig

    settings: Any = GenerationConfig
    model.generation_config = settings(**kept)


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    cut = next((position for position, token in enumerate(row) if token in ends), len(row))
    return row[:cut]
