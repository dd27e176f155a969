"""How far the student's kernel is from a target, for every value of its constants.

The inner products are computed once; each value then costs a pass over the matrix in blocks of
rows. What is evaluated are the kernels of `kuea_mllm.kernels`, without gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kuea_mllm.errors import DataError

Family = Literal["polynomial", "gaussian"]
_BLOCK_ROWS = 256


class GapCurve:
    """The gap as a function of one number: the logarithm (base 10) of rho or sigma in its unit.

    Args:
        x: Student embeddings, (n, width), on the CPU.
        target: Kernel matrix of the teacher, (n, n), in the same dtype.
        family: Kernel of the student.
        degree: Power of the polynomial kernel.

    Attributes:
        unit: Mean of |x|^2 (polynomial) or median distance of two embeddings (Gaussian).
        unit_value: Value of rho or sigma at the logarithm zero.
        target_mean: Mean of the target off its diagonal.
        target_variance: Gap that this mean, as a constant prediction, would leave.

    Raises:
        DataError: If student or target are the same for (nearly) every pair.
    """

    def __init__(self, x: Tensor, target: Tensor, family: Family, degree: int) -> None:
        self.family: Family = family
        self.degree = degree
        self.target = target
        inner = x @ x.T  # (n, n)
        square = inner.diagonal()
        if family == "polynomial":
            self.unit = float(square.mean())
            # Rho times the mean square is a pure number: how much the inner product of an
            # embedding with itself weighs against the offset.
            self.unit_value = 1 / self.unit
            self.relation = inner / self.unit
        else:
            distance = (square[:, None] + square[None, :] - 2 * inner).clamp_min_(0)
            upper = torch.ones_like(distance, dtype=torch.bool).triu_(1)
            self.unit = float(distance[upper].median().sqrt())
            if self.unit == 0:
                raise DataError(
                    "more than half of all pairs of images have equal student embeddings.",
                    "Take images that differ.",
                )
            self.unit_value = self.unit
            self.relation = distance / self.unit**2
            # A rounding error on the diagonal would count as a difference to itself.
            self.relation.fill_diagonal_(0)
        self.target_mean, squares = self._moments(target)
        self.target_variance = squares / target.numel()
        if self.target_variance <= 1e-12:
            raise DataError(
                "the teacher's kernel is the same for every pair of images, so that there is "
                "nothing to fit.",
                "Check objective.teacher_kernel, and that the images differ.",
            )

    @staticmethod
    def _moments(matrix: Tensor) -> tuple[float, float]:
        """Return the mean off the diagonal and the sum of squared distances to it."""
        count = len(matrix)
        mean = (float(matrix.sum(dtype=torch.float64)) - count) / (count * (count - 1))
        squares = float((matrix - mean).square_().sum(dtype=torch.float64))
        return mean, squares - count * (1 - mean) ** 2

    def describe(self, log_value: float) -> tuple[float, float]:
        """Return mean similarity of two images, and correlation with the target."""
        matrix = self._rows(log_value, slice(None))
        mean, squares = self._moments(matrix)
        if squares <= 0:
            return mean, 0.0
        product = (matrix - mean).mul_(self.target - self.target_mean)
        product.fill_diagonal_(0)
        target_squares = self.target_variance * self.target.numel()
        return mean, float(product.sum(dtype=torch.float64)) / math.sqrt(squares * target_squares)

    def loss(self, log_value: float) -> float:
        """Return the mean squared difference over the whole matrix.

        Args:
            log_value: Logarithm to base 10; minus and plus infinity are the limits.
        """
        total = 0.0
        for start in range(0, len(self.target), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            difference = self._rows(log_value, rows) - self.target[rows]
            total += float(difference.square_().sum(dtype=torch.float64))
        return total / self.target.numel()

    def _rows(self, log_value: float, rows: slice) -> Tensor:
        if self.family == "polynomial":
            return self._polynomial(log_value, rows)
        return self._gaussian(log_value, rows)

    def _polynomial(self, log_value: float, rows: slice) -> Tensor:
        # Both coefficients over their sum: the same kernel, and neither end is a special case.
        scale = 1 / (1 + 10.0**-log_value) if log_value > -300 else 0.0
        base = scale * self.relation[rows] + (1 - scale)
        diagonal = scale * self.relation.diagonal() + (1 - scale)
        norms = (diagonal[rows, None] * diagonal[None, :]).clamp_min_(torch.finfo(base.dtype).tiny)
        similarity: Tensor = base.div_(norms.sqrt_()) ** self.degree
        return similarity

    def _gaussian(self, log_value: float, rows: slice) -> Tensor:
        if log_value == -math.inf:
            return (self.relation[rows] == 0).to(self.relation.dtype)
        return torch.exp(self.relation[rows] * (-0.5 * 10.0 ** (-2 * log_value)))
