"""Class names are scored finely in any dtype."""

from __future__ import annotations

from typing import Any

import torch
from tiny_flamingo import IMAGE, SIDE, tiny_model
from torch import Tensor

from kuea_mllm.adapters.openflamingo.ranking import rank_names, rank_names_as_released

QUESTIONS, NAMES = 256, [[3], [5]]


def asked(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 96, (QUESTIONS, 8), generator=generator)
    ids[:, 0] = IMAGE
    pixels = torch.randn(QUESTIONS, 1, 3, SIDE, SIDE, generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(dtype)}


def distinct_margins(scores: Tensor) -> int:
    """Count how many values the lead of one name over the other takes; noise is no difference."""
    return len((scores.diff(dim=1) * 1e5).round().unique())


def test_bfloat16_ties_no_questions_that_its_states_tell_apart() -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        # Names that are about as likely, as "yes" and "no" are.
        weight = model.lm_head.weight
        weight[NAMES[1]] = weight[NAMES[0]] + 0.01 * torch.randn(weight.shape[1])
    model, given = model.bfloat16(), asked(torch.bfloat16)
    # What the model's own logits make of the same states, and what can be made of them.
    assert distinct_margins(rank_names_as_released(model, given, NAMES)) < QUESTIONS / 2
    assert distinct_margins(rank_names(model, given, NAMES)) > 0.95 * QUESTIONS


@torch.no_grad()
def test_bfloat16_scores_are_those_of_a_float32_output_layer() -> None:
    model: Any = tiny_model().bfloat16()
    given, names = asked(torch.bfloat16), [[3], [5, 7, 9], [4, 2]]
    found = rank_names(model, given, names)
    assert found.dtype == torch.float32
    weight = model.lm_head.weight.float()
    for column, ids in enumerate(names):
        # The cache rounds as one pass does, so the whole text gives the same states.
        name = torch.tensor(ids).expand(QUESTIONS, -1)
        whole = torch.cat([given["input_ids"], name], dim=1)
        read = model.read(
            whole, given["pixel_values"], attention_mask=torch.ones_like(whole, dtype=torch.bool)
        )
        steps = (read.last[:, -len(ids) - 1 : -1].float() @ weight.T).log_softmax(dim=-1)
        expected = steps.gather(2, name[:, :, None]).mean(dim=(1, 2))
        tolerance = 1e-5 if len(ids) == 1 else 0.03
        assert float((found[:, column] - expected).abs().max()) <= tolerance


@torch.no_grad()
def test_large_vocabularies_are_normalised_in_parts() -> None:
    from kuea_mllm.adapters.openflamingo import ranking

    states, weight = torch.randn(3, 2, 8), torch.randn(10_000, 8)
    assert weight.shape[0] > 2 * ranking._TOKENS_AT_ONCE
    found = ranking._log_sum_exp(states, weight)
    assert torch.allclose(found, (states @ weight.T).logsumexp(dim=-1), atol=1e-5)
