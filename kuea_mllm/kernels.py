"""Kernels that compare the rows of two feature matrices.

Three families (KUEA, ICML 2025, section 3 and appendix C): a cosine-normalised polynomial kernel,
a Gaussian kernel and the cosine. All of them are one on the diagonal *exactly*, in every dtype, so
the diagonal of a student kernel minus a teacher kernel adds a true zero to loss and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kuea_mllm.errors import TrainingDiverged

Scalar = float | Tensor


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

    Args:
        gamma: Positive scale of the inner product.
        coef0: Positive offset.
        degree: Power, at least 1.
        trainable: Whether `gamma` and `coef0` are parameters (the paper) or constants (what the
            released code amounts to). Both are part of the state dict under the same two names.
        dtype: Precision in which the two scalars are kept.
    """

    def __init__(
        self,
        gamma: float,
        coef0: float,
        degree: int = 3,
        trainable: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.gamma: Tensor
        self.coef0: Tensor
        self.degree = degree
        _hold_scalar(self, "gamma", gamma, trainable, dtype)
        _hold_scalar(self, "coef0", coef0, trainable, dtype)

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
        trainable: Whether `sigma` is a parameter or a constant; in the state dict either way.
        dtype: Precision in which `sigma` is kept.
    """

    def __init__(
        self, sigma: float, trainable: bool = False, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.sigma: Tensor
        _hold_scalar(self, "sigma", sigma, trainable, dtype)

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


Kernel = PolynomialKernel | GaussianKernel | CosineKernel


def _hold_scalar(
    module: nn.Module, name: str, value: float, trainable: bool, dtype: torch.dtype
) -> None:
    scalar = torch.tensor(float(value), dtype=dtype)
    if trainable:
        module.register_parameter(name, nn.Parameter(scalar))
    else:
        module.register_buffer(name, scalar)


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
