"""The objectives: which terms they have, where gradients go, what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kuea_mllm.kernels import CosineKernel, GaussianKernel, PolynomialKernel
from kuea_mllm.objectives import (
    FeatureAlignmentObjective,
    KernelAlignmentObjective,
    feature_loss,
    kernel_gap,
    preservation_loss,
)

# The first call of a kernel can take seconds on a busy machine.
relaxed = settings(deadline=None)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def objective(preserve_weight: float = 1.0) -> KernelAlignmentObjective:
    return KernelAlignmentObjective(
        PolynomialKernel(0.1, 0.5, trainable=True),
        PolynomialKernel(1 / 7, 1.0),
        kernel_weight=0.5,
        preserve_weight=preserve_weight,
    )


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    found = objective(3.0)(draws(6, 5), draws(6, 7, seed=1), draws(6, 5, seed=2))
    expected = 0.5 * found.terms["kernel"] + 3.0 * found.terms["preserve"]
    torch.testing.assert_close(found.total.detach(), expected)


def test_first_update_comes_from_the_kernel_term_alone() -> None:
    student = draws(6, 5).requires_grad_()
    found = objective()(student, draws(6, 7, seed=1), student.detach().clone())
    assert float(found.terms["preserve"]) == 0.0
    (gradient,) = torch.autograd.grad(found.total, student)
    kernel_only = objective(0.0)(student, draws(6, 7, seed=1), None)
    assert torch.equal(gradient, torch.autograd.grad(kernel_only.total, student)[0])


def test_teacher_and_original_receive_no_gradient() -> None:
    student, teacher, original = (draws(6, 5, seed=s).requires_grad_() for s in range(3))
    objective()(student, teacher, original).total.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert original.grad is None


def test_zero_preservation_weight_skips_the_term() -> None:
    found = objective(0.0)(draws(6, 5), draws(6, 7), None)
    assert set(found.terms) == {"kernel"}
    with pytest.raises(ValueError, match="original"):
        objective(1.0)(draws(6, 5), draws(6, 7), None)


def test_matching_kernels_have_no_gap() -> None:
    x = draws(6, 5)
    for kernel in (PolynomialKernel(0.1, 0.5), GaussianKernel(2.0), CosineKernel()):
        assert float(kernel_gap(kernel(x), kernel(x.clone()))) == 0.0


def test_one_image_has_no_gap() -> None:
    # The diagonal is one on both sides whatever the features, so a batch of one teaches nothing.
    student = draws(1, 5).requires_grad_()
    found = objective(0.0)(student, draws(1, 7), None)
    assert float(found.total.detach()) == 0.0
    assert not torch.autograd.grad(found.total, student)[0].any()


@relaxed
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_losses_follow_their_formulas(n: int, d: int, t: int) -> None:
    x, y, w, o = draws(n, d), draws(n, t, seed=1), draws(d, t, seed=2), draws(n, d, seed=3)
    expected = sum(((x[i] - w @ y[i]) ** 2).sum() for i in range(n)) / n
    torch.testing.assert_close(feature_loss(x, y, w), torch.as_tensor(expected))
    expected = sum(((x[i] - o[i]) ** 2).sum() for i in range(n)) / n
    torch.testing.assert_close(preservation_loss(x, o), torch.as_tensor(expected))


def test_half_precision_inputs_are_widened() -> None:
    half = draws(6, 5).to(torch.bfloat16)
    found = objective()(half, draws(6, 7).half(), draws(6, 5, seed=2).to(torch.bfloat16))
    assert found.total.dtype == torch.float32


def test_feature_map_is_trained_and_teacher_is_not() -> None:
    baseline = FeatureAlignmentObjective(5, 7, feature_weight=2.0, preserve_weight=1.0)
    teacher = draws(6, 7).requires_grad_()
    found = baseline(draws(6, 5), teacher, draws(6, 5, seed=1))
    found.total.backward()
    assert [n for n, _ in baseline.named_parameters()] == ["feature_map"]
    assert baseline.feature_map.grad is not None
    assert teacher.grad is None
    assert set(found.terms) == {"feature", "preserve"}


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel matrices"):
        kernel_gap(torch.zeros(4, 4), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="embeddings"):
        preservation_loss(torch.zeros(4, 3), torch.zeros(1, 3))
