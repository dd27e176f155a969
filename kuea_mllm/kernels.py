"""Kernels that compare the rows of two feature matrices.

Three families (KUEA, ICML 2025, section 3 and appendix C): a cosine-normalised polynomial kernel,
a Gaussian kernel and the cosine, and weighted means of them. All are one on the diagonal *exactly*,
in every dtype, so the diagonal of a student kernel minus a teacher kernel adds a true zero to loss
and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from kuea_mllm.errors import TrainingDiverged

Scalar = float | Tensor
Parametrisation = Literal["log", "direct"]


def polynomial_kernel(
    x: Tensor, y: Tensor, *, gamma: Scalar, coef0: Scalar, degree: int = 3
) -> Tensor:
    """Compare two sets of features under a cosine-normalised polynomial kernel.

    With `B = gamma x y^T + coef0` the result is `B_ij^degree / sqrt(B_ii^degree B_jj^degree)`. It
    depends on the parameters only through `rho = gamma / coef0`, and on the scale of a row unless
    `coef0` is zero, so features must not be normalised beforehand. Gradients flow through the
    normalising diagonal (as in the released code).

    Args:
        x: Features, (n, width); half precision is computed in float32, float64 stays float64.
        y: Features, (m, width). Pass the same tensor object as `x` for an exact unit diagonal.
        gamma: Positive scale of the inner product.
        coef0: Non-negative offset.
        degree: Power, at least 1; the sign of a similarity survives only an odd one.

    Returns:
        Similarities, (n, m), in [-1, 1].

    Raises:
        ValueError: If the widths differ or `degree` is below 1.
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, not {degree}")

    def base(inner: Tensor) -> Tensor:
        return gamma * inner + coef0

    # Normalised before the power: the same number, but B^6 can then neither over- nor underflow.
    similarity: Tensor = _normalised(x, y, base) ** degree
    return similarity


def gaussian_kernel(x: Tensor, y: Tensor, *, sigma: Scalar) -> Tensor:
    """Compare two sets of features by `exp(-|x_i - y_j|^2 / (2 sigma^2))`.

    Args:
        x: Features, (n, width); half precision is computed in float32, float64 stays float64.
        y: Features, (m, width).
        sigma: Positive bandwidth.

    Returns:
        Similarities, (n, m), in (0, 1].

    Raises:
        ValueError: If the widths differ.
    """
    inner, x_square, y_square = _inner_products(x, y)
    # Squared distances throughout: the root has no derivative at zero, which the diagonal and
    # duplicate rows reach, and its gradient there is NaN. Rounding may leave a squared distance of
    # -1e-7; clamping would cut the gradient, and the exponential does not mind.
    square_distance = x_square[:, None] + y_square[None, :] - 2 * inner  # (n, m)
    return torch.exp(-square_distance / (2 * sigma**2))


def cosine_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Compare two sets of features by the cosine of their angle.

    Args:
        x: Features, (n, width); half precision is computed in float32, float64 stays float64.
        y: Features, (m, width).

    Returns:
        Similarities, (n, m), in [-1, 1]; zero where a row is all zeros.

    Raises:
        ValueError: If the widths differ.
    """
    return _normalised(x, y, lambda inner: inner)


class PolynomialKernel(nn.Module):
    """The normalised polynomial kernel of one set of features with itself.

    The kernel depends on `rho = gamma / coef0` alone, so training both is training one number along
    a line: `gamma * dL/dgamma + coef0 * dL/dcoef0` is zero, and either can still cross zero, where
    the kernel loses its meaning. Under "log" the one parameter is `log_rho`: `coef0` stays what it
    was and `gamma` is `coef0 * exp(log_rho)`, positive whatever the step.

    Args:
        gamma: Positive scale of the inner product.
        coef0: Positive offset.
        degree: Power, at least 1.
        trainable: Whether the kernel has parameters (the paper) or constants (what the released
            code amounts to). `gamma` and `coef0` can be read as tensors either way.
        parametrisation: What a trainable kernel trains: "log" the logarithm of rho, "direct"
            `gamma` and `coef0` themselves, as the paper has it.
        dtype: Precision in which the scalars are kept.

    Raises:
        ValueError: If `gamma` or `coef0` has no logarithm and "log" needs it.
    """

    def __init__(
        self,
        gamma: float,
        coef0: float,
        degree: int = 3,
        trainable: bool = False,
        *,
        parametrisation: Parametrisation = "log",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.gamma: Tensor
        self.coef0: Tensor
        self.degree = degree
        if trainable and parametrisation == "log":
            log_rho = _logarithm("gamma", gamma) - _logarithm("coef0", coef0)
            _hold_scalar(self, "log_rho", log_rho, True, dtype)
            _hold_scalar(self, "coef0", coef0, False, dtype)
        else:
            _hold_scalar(self, "gamma", gamma, trainable, dtype)
            _hold_scalar(self, "coef0", coef0, trainable, dtype)

    def __getattr__(self, name: str) -> Any:
        """Compute `gamma` where it is not stored; torch calls this for names it does not find."""
        if name == "gamma" and (log_rho := _parameter(self, "log_rho")) is not None:
            return self.coef0 * log_rho.exp()
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the kernel matrix (n, n) of the features `x`, (n, width)."""
        return polynomial_kernel(x, x, gamma=self.gamma, coef0=self.coef0, degree=self.degree)

    def constants(self) -> dict[str, float]:
        """Return the current `gamma`, `coef0` and their ratio `rho`, for logs."""
        gamma, coef0 = self.gamma.item(), self.coef0.item()
        return {"gamma": gamma, "coef0": coef0, "rho": gamma / coef0 if coef0 else math.inf}

    def check(self) -> None:
        """Refuse parameters under which the kernel has lost its meaning.

        Raises:
            TrainingDiverged: If `gamma` or `coef0` is not positive and finite.
        """
        _check_positive("gamma", self.gamma)
        _check_positive("coef0", self.coef0)


class GaussianKernel(nn.Module):
    """The Gaussian kernel of one set of features with itself.

    Args:
        sigma: Positive bandwidth.
        trainable: Whether the bandwidth is a parameter or a constant; `sigma` can be read as a
            tensor either way.
        parametrisation: What a trainable kernel trains: "log" the parameter `log_sigma`, positive
            by construction; "direct" `sigma` itself.
        dtype: Precision in which the scalar is kept.

    Raises:
        ValueError: If `sigma` has no logarithm and "log" needs it.
    """

    def __init__(
        self,
        sigma: float,
        trainable: bool = False,
        *,
        parametrisation: Parametrisation = "log",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.sigma: Tensor
        if trainable and parametrisation == "log":
            _hold_scalar(self, "log_sigma", _logarithm("sigma", sigma), True, dtype)
        else:
            _hold_scalar(self, "sigma", sigma, trainable, dtype)

    def __getattr__(self, name: str) -> Any:
        """Compute `sigma` where it is not stored; torch calls this for names it does not find."""
        if name == "sigma" and (log_sigma := _parameter(self, "log_sigma")) is not None:
            return log_sigma.exp()
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the kernel matrix (n, n) of the features `x`, (n, width)."""
        return gaussian_kernel(x, x, sigma=self.sigma)

    def constants(self) -> dict[str, float]:
        """Return the current `sigma`, for logs."""
        return {"sigma": self.sigma.item()}

    def check(self) -> None:
        """Refuse a bandwidth under which the kernel has lost its meaning.

        Raises:
            TrainingDiverged: If `sigma` is not positive and finite.
        """
        _check_positive("sigma", self.sigma)


class CosineKernel(nn.Module):
    """The cosine of one set of features with itself; it has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the kernel matrix (n, n) of the features `x`, (n, width)."""
        return cosine_kernel(x, x)

    def constants(self) -> dict[str, float]:
        """Return an empty dictionary: there is nothing to log."""
        return {}

    def check(self) -> None:
        """Accept: without parameters nothing can diverge."""


class SumKernel(nn.Module):
    """The weighted mean of kernels of one set of features with itself.

    A mean and not a sum: divided by the sum of the weights it stays one on the diagonal like every
    other kernel here, so that matching it to another never asks for what no features can give.

    Args:
        parts: Positive weights, of which only the ratios matter, and kernels.

    Raises:
        ValueError: If there is no part, or a weight is not positive and finite.
    """

    def __init__(self, parts: Sequence[tuple[float, Kernel]]) -> None:
        super().__init__()
        weights = [float(weight) for weight, _ in parts]
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"a sum of kernels needs positive weights, not {weights}")
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.kernels = nn.ModuleList(kernel for _, kernel in parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the kernel matrix (n, n) of the features `x`, (n, width)."""
        matrices: list[Tensor] = [kernel(x) for kernel in self.kernels]
        # Rounded weights need not add up to one. Whatever they add up to in this dtype, added in
        # the same order, divides the diagonal, which thereby is one exactly.
        return self._total(matrices) / self._total([matrices[0].new_ones(()) for _ in matrices])

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        total = self.weights[0] * values[0]
        for weight, value in zip(self.weights[1:], values[1:], strict=True):
            total = total + weight * value
        return total

    def constants(self) -> dict[str, float]:
        """Return the constants of every part under its position: `0_gamma`, `1_sigma`, ..."""
        return {
            f"{position}_{name}": value
            for position, kernel in enumerate(self._parts())
            for name, value in kernel.constants().items()
        }

    def check(self) -> None:
        """Refuse parameters under which any part has lost its meaning.

        Raises:
            TrainingDiverged: If a parameter of a part is not positive and finite.
        """
        for kernel in self._parts():
            kernel.check()

    def _parts(self) -> list[Kernel]:
        return cast("list[Kernel]", list(self.kernels))


Kernel: TypeAlias = PolynomialKernel | GaussianKernel | CosineKernel | SumKernel


def _hold_scalar(
    module: nn.Module, name: str, value: float, trainable: bool, dtype: torch.dtype
) -> None:
    scalar = torch.tensor(float(value), dtype=dtype)
    if trainable:
        module.register_parameter(name, nn.Parameter(scalar))
    else:
        module.register_buffer(name, scalar)


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    # By way of __dict__: copying and unpickling ask for attributes before there are parameters.
    parameter: nn.Parameter | None = module.__dict__.get("_parameters", {}).get(name)
    return parameter


def _logarithm(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite to train its logarithm, not {value}")
    return math.log(value)


def _check_positive(name: str, value: Tensor) -> None:
    number = value.item()
    if not (math.isfinite(number) and number > 0):
        raise TrainingDiverged(
            f"the kernel parameter {name} became {number:g}; it must be positive and finite.",
            "Lower the learning rate of the kernel parameters, or keep them fixed.",
        )


def _normalised(x: Tensor, y: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    inner, x_square, y_square = _inner_products(x, y)
    scale = base(x_square)[:, None] * base(y_square)[None, :]  # (n, m)
    # Only an all-zero row under the cosine reaches the clamp; its similarity is then 0, not NaN.
    return base(inner) / scale.clamp_min(torch.finfo(scale.dtype).tiny).sqrt()


def _inner_products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x y^T (n, m), |x_i|^2 (n,) and |y_j|^2 (m,) in float32 or float64."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be (n, width) each, not {x.shape} and {y.shape}")
    is_same = y is x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    y = x if is_same else y.to(torch.promote_types(y.dtype, torch.float32))
    # Autocast would run the product in half precision whatever the dtype of its inputs.
    with torch.autocast(x.device.type, enabled=False):
        inner = x @ y.T
    if is_same:
        # The product's own diagonal, not a separate sum: sqrt(a * a) is a in IEEE arithmetic, and
        # with it the diagonal of every kernel comes out as exactly one.
        return inner, inner.diagonal(), inner.diagonal()
    return inner, x.square().sum(1), y.square().sum(1)
