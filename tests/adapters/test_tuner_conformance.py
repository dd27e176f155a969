from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from original_llava import make_original, make_tower
from torch import Tensor, nn

from kuea_mllm.adapters.base import TuningFormat, TuningParts
from kuea_mllm.adapters.conformance import tuner_problems_of
from kuea_mllm.adapters.llava.adapter import LlavaAdapter


def test_llava_conforms(tiny_llava: Path) -> None:
    assert tuner_problems_of(LlavaAdapter(), tiny_llava) == []


def test_adapter_that_does_not_tune_is_said_so(tiny_llava: Path) -> None:
    class Swapping:
        name = "swapping"

    adapter: Any = Swapping()
    assert tuner_problems_of(adapter, tiny_llava) == [
        "the adapter does not provide what MLLMTuner asks for"
    ]


def test_base_that_cannot_be_tuned_is_a_finding(tmp_path: Path) -> None:
    base = make_original(tmp_path / "base", make_tower(tmp_path / "tower"))
    problems = tuner_problems_of(LlavaAdapter(), base)
    assert len(problems) == 5
    assert all("original layout" in problem for problem in problems)


class WrongParts(LlavaAdapter):
    def tuning_parts(self, base: Path) -> TuningParts:
        return replace(
            super().tuning_parts(base),
            projector=("model.bridge",),
            vision_tower="model.vision_tower.encoder",
            vocabulary_size=999,
        )


def test_wrong_parts_are_found(tiny_llava: Path) -> None:
    problems = "\n".join(tuner_problems_of(WrongParts(), tiny_llava))
    for words in (
        "names model.bridge, which the model does not have",
        "vocabulary_size is 999 of 384 rows",
        "takes model.vision_tower.encoder for the tower, vision_module() another",
    ):
        assert words in problems


class NoTargets(LlavaAdapter):
    def tuning_parts(self, base: Path) -> TuningParts:
        return replace(super().tuning_parts(base), excluded=("layers",))


def test_parts_without_targets_are_found(tiny_llava: Path) -> None:
    assert tuner_problems_of(NoTargets(), tiny_llava) == [
        "tuning_parts() leaves no linear layer for LoRA"
    ]


class _Learning:
    """Learns everything, and something else each time."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.placeholder = encoder, encoder.placeholder
        self.count = 0

    def encode(self, record: Mapping[str, Any]) -> Any:
        self.count += 1
        encoded = self.encoder.encode(record)
        return encoded._replace(labels=[self.count] * len(encoded.labels))


class WrongFormat(LlavaAdapter):
    def tuning_format(self, base: Path, *, max_length: int) -> TuningFormat:
        reading = super().tuning_format(base, max_length=max_length)
        encoder: Any = _Learning(reading.encoder)
        return replace(reading, encoder=encoder, image_size=8)


def test_wrong_format_is_found(tiny_llava: Path) -> None:
    problems = "\n".join(tuner_problems_of(WrongFormat(), tiny_llava))
    for words in ("another sample the next time", "not its tokens", "learns ", "image_size is 8"):
        assert words in problems


class Leaking(LlavaAdapter):
    """Packed samples see each other, and the tower is trained along."""

    def hidden_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        whole: Any = model
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        states: Tensor = whole.model(**{**batch, "attention_mask": mask}).last_hidden_state
        return states


def test_leaks_are_found(tiny_llava: Path) -> None:
    problems = tuner_problems_of(Leaking(), tiny_llava)
    assert [problem.split(" differ")[0] for problem in problems[:-1]] == [
        "hidden_states() of packed rows"
    ] * 2
    assert problems[-1] == "hidden_states() gives model.vision_tower a gradient"
