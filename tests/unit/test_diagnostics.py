"""Drift and similarity measures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kuea_mllm.diagnostics import embedding_drift, linear_cka, relative_token_drift

# The first call of a kernel can take seconds on a busy machine.
relaxed = settings(deadline=None)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_unchanged_embeddings_have_no_drift() -> None:
    drift = embedding_drift(draws(5, 4), draws(5, 4))
    assert drift["distance_max"] == drift["bound_max"] == 0.0
    assert drift["cosine_mean"] == pytest.approx(1.0)
    assert relative_token_drift(draws(2, 3, 4), draws(2, 3, 4)) == 0.0


def test_drift_of_a_known_shift() -> None:
    drift = embedding_drift(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
    assert drift["distance_mean"] == drift["distance_max"] == pytest.approx(4.0)
    assert drift["cosine_mean"] == pytest.approx(0.6)
    assert drift["bound_mean"] == drift["bound_max"] == pytest.approx(2 * 4 / 5)
    assert relative_token_drift(torch.full((2, 2), 3.0), torch.full((2, 2), 2.0)) == 0.5


@relaxed
@given(st.integers(0, 2**31), st.floats(0.01, 3.0))
def test_no_cosine_moves_by_more_than_the_bound(seed: int, size: float) -> None:
    original = draws(6, 5, seed=seed).double()
    student = original + size * draws(6, 5, seed=seed + 1).double()
    text = draws(7, 5, seed=seed + 2).double()

    def cosines(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(text).T

    moved = (cosines(student) - cosines(original)).abs().max()
    assert float(moved) <= embedding_drift(student, original)["bound_max"] + 1e-12


def test_cka_ignores_rotation_and_scale_and_sees_difference() -> None:
    x = draws(50, 4)
    rotation, _ = torch.linalg.qr(draws(4, 4, seed=1))
    assert linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1.0)
    assert linear_cka(x, draws(50, 6, seed=2)) < 0.5
    assert linear_cka(x, torch.ones(50, 3)) == 0.0


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="embeddings"):
        embedding_drift(draws(3, 4), draws(3, 5))
    with pytest.raises(ValueError, match="tokens"):
        relative_token_drift(draws(3, 4), draws(3, 5))
    with pytest.raises(ValueError, match="features"):
        linear_cka(draws(3, 4), draws(2, 4))
