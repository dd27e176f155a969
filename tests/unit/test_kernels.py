"""Properties of the kernels that hold for any features."""

from __future__ import annotations

import copy
import math
import pickle

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
    SumKernel,
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


def mixed_kernel(weights: tuple[float, float, float], trainable: bool = False) -> SumKernel:
    parts = (PolynomialKernel(0.1, 0.5, 2, trainable), GaussianKernel(2.0, trainable))
    return SumKernel(list(zip(weights, (*parts, CosineKernel()), strict=True)))


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
    kernel = PolynomialKernel(
        gamma, coef0, trainable=True, parametrisation="direct", dtype=torch.float64
    )
    torch.autograd.backward(kernel(x).square().sum())
    assert kernel.gamma.grad is not None
    assert kernel.coef0.grad is not None
    terms = [kernel.gamma * kernel.gamma.grad, kernel.coef0 * kernel.coef0.grad]
    scale = float(terms[0].abs().detach()) + 1e-12 * x.shape[0]
    assert abs(float((terms[0] + terms[1]).detach())) <= 1e-8 * scale + 1e-12


@pytest.mark.parametrize(
    "kernel",
    [
        PolynomialKernel(0.1, 0.5),
        GaussianKernel(2.0),
        CosineKernel(),
        mixed_kernel((1.0, 1.0, 1.0)),
    ],
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


@relaxed
@given(features(torch.float64), POSITIVE, POSITIVE, st.integers(1, 5))
def test_gradient_of_the_logarithm_is_rho_times_that_of_rho(
    x: Tensor, gamma: float, coef0: float, degree: int
) -> None:
    kernel = PolynomialKernel(gamma, coef0, degree, trainable=True, dtype=torch.float64)
    (found,) = torch.autograd.grad(kernel(x).square().sum(), list(kernel.parameters()))
    # With an offset of one, gamma is rho.
    rho = torch.tensor(gamma / coef0, dtype=torch.float64, requires_grad=True)
    k = polynomial_kernel(x, x, gamma=rho, coef0=1.0, degree=degree)
    (slope,) = torch.autograd.grad(k.square().sum(), rho)
    torch.testing.assert_close(found, rho.detach() * slope, rtol=1e-7, atol=1e-9)


@relaxed
@given(features(torch.float64), POSITIVE)
def test_gradient_of_the_logarithm_is_sigma_times_that_of_sigma(x: Tensor, sigma: float) -> None:
    kernel = GaussianKernel(sigma, trainable=True, dtype=torch.float64)
    (found,) = torch.autograd.grad(kernel(x).square().sum(), list(kernel.parameters()))
    variable = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gaussian_kernel(x, x, sigma=variable).square().sum(), variable)
    torch.testing.assert_close(found, sigma * slope, rtol=1e-7, atol=1e-9)


@relaxed
@given(POSITIVE, POSITIVE, st.floats(-30, 30))
def test_no_step_takes_a_logarithmic_kernel_out_of_range(
    gamma: float, coef0: float, step: float
) -> None:
    # Thirteen decades either way; a direct parameter would be negative after a step of -10.
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for kernel in (PolynomialKernel(gamma, coef0, trainable=True), GaussianKernel(gamma, True)):
        (parameter,) = kernel.parameters()
        with torch.no_grad():
            parameter.add_(step)
        kernel.check()
        k = kernel(x).detach()
        assert bool(k.isfinite().all())
        assert float(k.abs().max()) <= 1 + 1e-5


@pytest.mark.parametrize("step", [-1e4, 1e4])
def test_a_step_beyond_all_numbers_is_refused(step: float) -> None:
    for kernel, name in (
        (PolynomialKernel(1.0, 1.0, trainable=True), "gamma"),
        (GaussianKernel(1.0, True), "sigma"),
    ):
        with torch.no_grad():
            next(kernel.parameters()).add_(step)
        with pytest.raises(TrainingDiverged, match=name):
            kernel.check()


def test_training_moves_rho_to_that_of_the_target() -> None:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = polynomial_kernel(x, x, gamma=0.3, coef0=1.5)
    kernel = PolynomialKernel(40.0, 2.0, trainable=True, dtype=torch.float64)
    optimizer = torch.optim.Adam(kernel.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        torch.autograd.backward((kernel(x) - target).square().mean())
        optimizer.step()
    assert kernel.constants()["rho"] == pytest.approx(0.2, rel=1e-3)
    assert kernel.constants()["coef0"] == 2.0


@pytest.mark.parametrize(
    ("kernel", "names", "parameters"),
    [
        (PolynomialKernel(0.25, 0.5), ["gamma", "coef0"], []),
        (
            PolynomialKernel(0.25, 0.5, trainable=True, parametrisation="direct"),
            ["gamma", "coef0"],
            ["gamma", "coef0"],
        ),
        (PolynomialKernel(0.25, 0.5, trainable=True), ["log_rho", "coef0"], ["log_rho"]),
        (GaussianKernel(3.0), ["sigma"], []),
        (GaussianKernel(3.0, True, parametrisation="direct"), ["sigma"], ["sigma"]),
        (GaussianKernel(3.0, True), ["log_sigma"], ["log_sigma"]),
    ],
)
def test_scalars_are_in_the_state_dict_and_come_back(
    kernel: PolynomialKernel | GaussianKernel, names: list[str], parameters: list[str]
) -> None:
    assert list(kernel.state_dict()) == names
    assert [name for name, _ in kernel.named_parameters()] == parameters
    expected = {"sigma": 3.0}
    if isinstance(kernel, PolynomialKernel):
        expected = {"gamma": 0.25, "coef0": 0.5, "rho": 0.5}
    assert kernel.constants() == pytest.approx(expected, rel=1e-6)
    other = copy.deepcopy(kernel)
    for value in other.state_dict().values():
        value.add_(1.0)
    assert other.constants() != kernel.constants()
    other.load_state_dict(kernel.state_dict())
    assert other.constants() == kernel.constants()
    assert pickle.loads(pickle.dumps(kernel)).constants() == kernel.constants()


def test_computed_scalars_carry_gradient() -> None:
    polynomial, gaussian = PolynomialKernel(0.25, 0.5, trainable=True), GaussianKernel(3.0, True)
    for value, parameter in (
        (polynomial.gamma, polynomial.log_rho),
        (gaussian.sigma, gaussian.log_sigma),
    ):
        (slope,) = torch.autograd.grad(value, parameter)
        torch.testing.assert_close(slope, value.detach())


def test_an_unknown_attribute_of_a_kernel_is_an_error() -> None:
    for kernel in (PolynomialKernel(0.25, 0.5, trainable=True), GaussianKernel(3.0, True)):
        with pytest.raises(AttributeError, match="degre"):
            _ = kernel.degre


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_value_without_logarithm_cannot_be_trained_by_it(value: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        PolynomialKernel(value, 1.0, trainable=True)
    with pytest.raises(ValueError, match="coef0"):
        PolynomialKernel(1.0, value, trainable=True)
    with pytest.raises(ValueError, match="sigma"):
        GaussianKernel(value, True)


@relaxed
@given(features(), st.tuples(POSITIVE, POSITIVE, POSITIVE))
def test_sum_kernel_is_symmetric_with_a_diagonal_of_exactly_one(
    x: Tensor, weights: tuple[float, float, float]
) -> None:
    k = mixed_kernel(weights)(x)
    assert torch.equal(k.diagonal(), torch.ones(len(x), dtype=k.dtype))
    torch.testing.assert_close(k, k.T)
    assert float(k.abs().max()) <= 1 + 1e-5


@relaxed
@given(features(torch.float64), st.tuples(POSITIVE, POSITIVE, POSITIVE), POSITIVE)
def test_sum_kernel_is_the_weighted_mean_of_its_parts(
    x: Tensor, weights: tuple[float, float, float], factor: float
) -> None:
    a, b, c = weights
    k = mixed_kernel(weights)(x)
    expected = (
        a * polynomial_kernel(x, x, gamma=torch.tensor(0.1), coef0=0.5, degree=2)
        + b * gaussian_kernel(x, x, sigma=2.0)
        + c * cosine_kernel(x, x)
    ) / (a + b + c)
    torch.testing.assert_close(k, expected)
    torch.testing.assert_close(mixed_kernel((factor * a, factor * b, factor * c))(x), k)


@relaxed
@given(features(), POSITIVE, st.integers(1, 5))
def test_sum_kernel_of_one_part_is_that_part(x: Tensor, weight: float, degree: int) -> None:
    part = PolynomialKernel(0.3, 0.7, degree)
    assert torch.equal(SumKernel([(weight, part)])(x), part(x))


def test_sum_kernel_names_the_constants_of_its_parts() -> None:
    kernel = mixed_kernel((1.0, 2.0, 1.0), trainable=True)
    found = kernel.constants()
    assert list(found) == ["0_gamma", "0_coef0", "0_rho", "1_sigma"]
    assert found["1_sigma"] == pytest.approx(2.0)
    assert kernel.weights == (0.25, 0.5, 0.25)
    assert [name for name, _ in kernel.named_parameters()] == [
        "kernels.0.log_rho",
        "kernels.1.log_sigma",
    ]
    other = mixed_kernel((1.0, 2.0, 1.0), trainable=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.sub_(1.0)
    other.load_state_dict(kernel.state_dict())
    assert other.constants() == found


def test_sum_kernel_checks_its_parts() -> None:
    mixed_kernel((1.0, 1.0, 1.0)).check()
    with pytest.raises(TrainingDiverged, match="sigma"):
        SumKernel([(1.0, CosineKernel()), (1.0, GaussianKernel(-1.0))]).check()


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [math.nan]])
def test_sum_kernel_needs_positive_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive weights"):
        SumKernel([(weight, CosineKernel()) for weight in weights])


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
