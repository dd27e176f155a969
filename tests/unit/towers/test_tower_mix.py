"""Mixing the weights of two towers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kuea_mllm.errors import TowerMismatch, UserError
from kuea_mllm.towers.model.mix import mix_states

ORIGINAL = {"a": torch.tensor([1.0, -0.0, float("inf")]), "b": torch.full((2, 2), 3.0)}
TUNED = {"a": torch.tensor([2.0, 4.0, 5.0]), "b": torch.full((2, 2), -1.0)}


def test_ends_are_exact_even_where_arithmetic_is_not() -> None:
    for weight, expected in ((0.0, ORIGINAL), (1.0, TUNED)):
        mixed = mix_states(ORIGINAL, TUNED, weight)
        assert list(mixed) == ["a", "b"]
        assert all(torch.equal(mixed[name], expected[name]) for name in expected)
    # torch.equal takes -0.0 for 0.0.
    assert torch.signbit(mix_states(ORIGINAL, TUNED, 0)["a"][1])


@given(st.floats(0, 1))
def test_weight_is_the_share_of_the_tuned_one(weight: float) -> None:
    mixed = mix_states({"x": torch.tensor([0.0])}, {"x": torch.tensor([2.0])}, weight)
    assert mixed["x"].item() == pytest.approx(2 * weight)


def test_half_precision_is_mixed_in_float32() -> None:
    one, other = torch.tensor([1.0]).half(), torch.tensor([1.0009765625]).half()
    mixed = mix_states({"x": one}, {"x": other}, 0.5)["x"]
    assert mixed.dtype == torch.float32
    assert 1.0 < mixed.item() < 1.0009765625


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(TowerMismatch, match="only one of them holds b"):
        mix_states({"a": ORIGINAL["a"]}, TUNED, 0.5)
    with pytest.raises(TowerMismatch, match="b has shape"):
        mix_states(ORIGINAL, TUNED | {"b": torch.zeros(3)}, 0.5)["b"]
    for weight in (-0.1, 1.5):
        with pytest.raises(UserError, match=r"from 0 .* to 1"):
            mix_states(ORIGINAL, TUNED, weight)
