"""What the runtimes share: options, tokens that are nothing to say, and a device without memory."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kuea_mllm.adapters.answering import (
    AnsweringRuntime,
    forget_stored_settings,
    memory_named,
    unwritable_tokens,
)
from kuea_mllm.adapters.generation import generation_options
from kuea_mllm.errors import EnvironmentFailure, UserError


def test_greedy_decoding_names_no_option_of_sampling() -> None:
    greedy = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert generation_options(5, 3, 0.0, 0.9) == greedy


def test_sampling_goes_over_the_whole_vocabulary_unless_asked() -> None:
    options = generation_options(5, 1, 0.7, None)
    assert options["do_sample"] and (options["temperature"], options["top_k"]) == (0.7, 0)
    assert "top_p" not in options
    assert generation_options(5, 1, 0.7, 0.9)["top_p"] == 0.9


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="max_new_tokens"):
        generation_options(0, 1, 0.0, None)


@pytest.mark.parametrize(("image_token", "expected"), [(1, {1, 3, 4}), (7, {3, 4}), (None, {3, 4})])
def test_rows_without_a_token_and_placeholders_are_never_written(
    image_token: int | None, expected: set[int]
) -> None:
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "<image>": 1, "b": 2})
    assert unwritable_tokens(tokenizer, 5, image_token) == expected


def test_device_without_memory_is_one_line_and_what_is_kept_is_let_go() -> None:
    forgotten: list[bool] = []
    with (
        pytest.raises(EnvironmentFailure, match=r"on cpu with a batch of 3\.") as raised,
        memory_named(
            torch.device("cpu"), "with a batch of 3", forget=lambda: forgotten.append(True)
        ),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert forgotten == [True]
    assert raised.value.remedy.startswith("Choose a smaller --batch-size")


class Repeating(AnsweringRuntime):
    """Gives rows that were written before."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.asked: dict[str, Any] = {}

        def generate(input_ids: torch.Tensor, **asked: Any) -> torch.Tensor:
            self.asked = asked
            return torch.cat([input_ids, torch.tensor(rows)], dim=1)

        self.model = SimpleNamespace(generate=generate)
        self._ends, self._suppressed = [8, 9], []

    def _answer(self, *_: Any) -> list[list[int]]:
        raise NotImplementedError


def test_answers_end_before_the_first_of_their_end_tokens() -> None:
    runtime = Repeating([[1, 9, 8], [2, 3, 4], [8, 1, 1]])
    inputs = {"input_ids": torch.zeros(3, 2, dtype=torch.long)}
    assert runtime._go_on(inputs, {"num_beams": 1}) == [[1], [2, 3, 4], []]
    assert runtime.asked == {"num_beams": 1, "suppress_tokens": None}


def test_kept_prefixes_are_repeated_for_beams() -> None:
    repeated: list[int] = []
    cache = SimpleNamespace(batch_repeat_interleave=repeated.append)
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "past_key_values": cache}
    Repeating([[1]])._go_on(inputs, {"num_beams": 4})
    Repeating([[1]])._go_on(inputs, {"num_beams": 1})
    assert repeated == [4]


def test_stored_settings_are_forgotten_but_for_those_given() -> None:
    model = SimpleNamespace(generation_config=None)
    forget_stored_settings(model, eos_token_id=[2])
    assert model.generation_config.eos_token_id == [2]
    assert model.generation_config.temperature is None
