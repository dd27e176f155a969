"""Properties of the kernels that hold for any features."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kuea_mllm.errors import TrainingDiverged
from kuea_mllm.kernels import (
    CosineKernel,
    GaussianKernel,
    PolynomialKernel,
    cosine_kernel,
    gaussian_kernel,
    polynomial_kernel,
)

# The first call of a kernel can take seconds on a busy machine.
relaxed = settings(deadline=None)
POSITIVE = st.floats(min_value=1e-3, max_value=10.0)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@st.composite
def features(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (x * draw(POSITIVE)).to(dtype or draw(DTYPES))


def every_kernel(x: Tensor, gamma: float, coef0: float) -> list[Tensor]:
    return [
        polynomial_kernel(x, x, gamma=gamma, coef0=coef0),
        gaussian_kernel(x, x, sigma=gamma),
        cosine_kernel(x, x),
    ]


@relaxed
@given(features(), POSITIVE, POSITIVE)
def test_kernel_diagonal_is_exactly_one(x: Tensor, gamma: float, coef0: float) -> None:
    for k in every_kernel(x, gamma, coef0):
        assert torch.equal(k.diagonal(), torch.ones(len(x), dtype=k.dtype))


@relaxed
@given(features(torch.float64), POSITIVE, POSITIVE)
def test_kernel_is_symmetric_and_bounded(x: Tensor, gamma: float, coef0: float) -> None:
    for k in every_kernel(x, gamma, coef0):
        torch.testing.assert_close(k, k.T)
        assert float(k.abs().max()) <= 1 + 1e-12


@relaxed
@given(features(), POSITIVE)
def test_kernel_is_computed_in_float32_or_wider(x: Tensor, gamma: float) -> None:
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    for k in every_kernel(x, gamma, 1.0):
        assert k.dtype == expected


@relaxed
@given(features(torch.float64), POSITIVE, POSITIVE, st.integers(1, 6))
def test_kernel_follows_its_formula(x: Tensor, gamma: float, coef0: float, degree: int) -> None:
    y = x.flip(0) * 0.7 + 0.1
    b, bx, by = (gamma * p + coef0 for p in (x @ y.T, (x * x).sum(1), (y * y).sum(1)))
    expected = b**degree / torch.outer(bx**degree, by**degree).sqrt()
    found = polynomial_kernel(x, y, gamma=gamma, coef0=coef0, degree=degree)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    expected = torch.exp(-distance.square() / (2 * gamma**2))
    torch.testing.assert_close(gaussian_kernel(x, y, sigma=gamma), expected, rtol=1e-6, atol=1e-9)


@relaxed
@given(features(torch.float64), POSITIVE, st.integers(1, 6))
def test_degree_decides_about_the_sign(x: Tensor, gamma: float, degree: int) -> None:
    # Without offset the kernel is cosine^degree: odd powers flip with one argument, even do not.
    k = polynomial_kernel(x, x.clone(), gamma=gamma, coef0=0.0, degree=degree)
    flipped = polynomial_kernel(-x, x.clone(), gamma=gamma, coef0=0.0, degree=degree)
    torch.testing.assert_close(flipped, k * (-1) ** degree)


@relaxed
@given(features(torch.float64), POSITIVE, POSITIVE, POSITIVE)
def test_polynomial_kernel_depends_on_the_ratio_alone(
    x: Tensor, gamma: float, coef0: float, factor: float
) -> None:
    k = polynomial_kernel(x, x, gamma=gamma, coef0=coef0)
    scaled = polynomial_kernel(x, x, gamma=gamma * factor, coef0=coef0 * factor)
    torch.testing.assert_close(scaled, k, rtol=1e-9, atol=1e-12)


@relaxed
@given(features(torch.float64), POSITIVE, POSITIVE)
def test_parameter_gradients_cancel_along_the_ratio(x: Tensor, gamma: float, coef0: float) -> None:
    kernel = PolynomialKernel(gamma, coef0, trainable=True, dtype=torch.float64)
    torch.autograd.backward(kernel(x).square().sum())
    assert kernel.gamma.grad is not None
    assert kernel.coef0.grad is not None
    terms = [kernel.gamma * kernel.gamma.grad, kernel.coef0 * kernel.coef0.grad]
    scale = float(terms[0].abs().detach()) + 1e-12 * x.shape[0]
    assert abs(float((terms[0] + terms[1]).detach())) <= 1e-8 * scale + 1e-12


@pytest.mark.parametrize(
    "kernel", [PolynomialKernel(0.1, 0.5), GaussianKernel(2.0), CosineKernel()]
)
def test_duplicate_rows_have_finite_gradients(kernel: torch.nn.Module) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    x.requires_grad_()
    kernel(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_cosine_of_a_zero_row_is_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    k = cosine_kernel(x, x)
    torch.autograd.backward(k.sum())
    assert k[0].tolist() == [0.0, 0.0]
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_large_features_do_not_overflow() -> None:
    x = torch.full((3, 4), 1e8)
    assert bool(polynomial_kernel(x, x, gamma=1.0, coef0=1.0).isfinite().all())


def test_autocast_does_not_reach_the_kernel() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        k = polynomial_kernel(x, x, gamma=0.1, coef0=0.5)
    assert torch.equal(k, polynomial_kernel(x, x, gamma=0.1, coef0=0.5))


def test_widths_and_degrees_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="features must be"):
        cosine_kernel(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="degree"):
        polynomial_kernel(torch.zeros(2, 3), torch.zeros(2, 3), gamma=1, coef0=1, degree=0)


@pytest.mark.parametrize("trainable", [True, False])
def test_scalars_are_in_the_state_dict_either_way(trainable: bool) -> None:
    kernel = PolynomialKernel(0.25, 0.5, trainable=trainable)
    assert {k: float(v) for k, v in kernel.state_dict().items()} == {"gamma": 0.25, "coef0": 0.5}
    assert [n for n, _ in kernel.named_parameters()] == (["gamma", "coef0"] if trainable else [])
    assert kernel.constants() == {"gamma": 0.25, "coef0": 0.5, "rho": 0.5}
    other = PolynomialKernel(1.0, 1.0, trainable=not trainable)
    other.load_state_dict(kernel.state_dict())
    assert other.constants() == kernel.constants()
    sigma = GaussianKernel(3.0, trainable)
    assert list(sigma.state_dict()) == ["sigma"]
    assert sigma.constants() == {"sigma": 3.0}


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (PolynomialKernel(-1e-3, 0.5), "gamma"),
        (PolynomialKernel(1e-3, 0.0), "coef0"),
        (PolynomialKernel(float("nan"), 0.5), "gamma"),
        (GaussianKernel(float("inf")), "sigma"),
    ],
)
def test_check_names_the_parameter_that_lost_its_meaning(
    kernel: PolynomialKernel | GaussianKernel, name: str
) -> None:
    with pytest.raises(TrainingDiverged, match=name):
        kernel.check()


def test_check_accepts_what_is_in_range() -> None:
    for kernel in (PolynomialKernel(1e-3, 0.5), GaussianKernel(2.0), CosineKernel()):
        kernel.check()
