"""The constants of the student's kernel, from embeddings of a few hundred images.

The criterion is the authors': the student's kernel matrix shall be as near to the teacher's as its
constants can make it, in mean squared difference, before anything is trained. The polynomial kernel
depends on `rho = gamma / coef0` alone and the Gaussian on `sigma`, so this is a search along one
line. It is carried out over the logarithm, first on a grid over many decades and then within the
lowest bracket; the result depends on nothing but the embeddings.

There need not be a minimum: where a wider range always fits better the curve ends in a limit, which
for `rho -> infinity` is the cosine to the power of the degree. The constant is then the nearest one
that fits about as well, and is reported as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from kuea_mllm.errors import DataError
from kuea_mllm.kernel_curve import Family, GapCurve
from kuea_mllm.kernels import Kernel

Optimum = Literal["interior", "infinity", "zero", "flat"]

MIN_IMAGES = 16
FLOAT64_IMAGES = 4096
NEAR = 0.01
"""Losses within this share of the lowest count as equal to it."""
NEGLIGIBLE = 1e-4
"""So do losses within this share of the target's variance: where the fit is nearly perfect, one
per cent of almost nothing would tell numbers apart that no training could."""
# Decades around the unit (see `Calibration.unit`), in the resolution of the grid.
_DECADES: dict[Family, tuple[float, float]] = {"polynomial": (-4.0, 6.0), "gaussian": (-2.0, 3.0)}
_GRID_POINTS = 81


@dataclass(frozen=True)
class Fit:
    """What the criterion says about one set of images.

    Attributes:
        value: The chosen rho or sigma.
        loss: Its loss: mean squared difference over the whole matrix, diagonal included, which is
            the kernel term of the training.
        optimum: "interior" if the choice is a minimum that lies noticeably below both limits;
            "infinity" or "zero" if values all the way to that limit are near the infimum, in which
            case the choice is the other end of them; "flat" if all values are near it.
        lowest_loss: The infimum, limits included.
        lowest_at: Where it lies; None stands for a limit.
        near: Smallest and largest value whose loss is near the infimum; None stands for an end that
            lies in the limit.
        limits: Loss in the limits zero and infinity.
    """

    value: float
    loss: float
    optimum: Optimum
    lowest_loss: float
    lowest_at: float | None
    near: tuple[float | None, float | None]
    limits: tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    """The outcome of a calibration.

    Attributes:
        family: Kernel of the student.
        degree: Power of the polynomial kernel; None for the Gaussian.
        count: Images.
        unit: What `value` is measured against: for the polynomial kernel the mean of |x|^2, for the
            Gaussian the median distance of two embeddings.
        fit: The choice and what is known about it.
        constants: `gamma` and `coef0`, or `sigma`. Of the pair only the ratio matters; the scale is
            set by `gamma * mean |x|^2 + coef0 = 1`.
        curve: Value and loss along the grid.
        target_variance: Mean squared difference that the best constant prediction of the target's
            off-diagonal entries would leave, counted over the whole matrix like `loss`.
        quarters: The same fit on four disjoint quarters of the images.
        compared: Value and loss of the constants that were asked about.
        mean_student: Mean similarity of two images under the student's calibrated kernel.
        mean_teacher: The same under the teacher's.
        correlation: Pearson correlation of the two kernels over all pairs of images: how alike they
            are apart from level and range, which training can still move.
    """

    family: Family
    degree: int | None
    count: int
    unit: float
    fit: Fit
    constants: dict[str, float]
    curve: tuple[tuple[float, float], ...]
    target_variance: float
    quarters: tuple[Fit, ...]
    compared: tuple[float, float] | None
    mean_student: float
    mean_teacher: float
    correlation: float

    @property
    def parameter(self) -> str:
        """Name of the one number that was chosen."""
        return "rho" if self.family == "polynomial" else "sigma"

    @property
    def explained(self) -> float:
        """Share of the target's variance that the student's kernel explains; at most one."""
        return 1.0 - self.fit.loss / self.target_variance

    @property
    def spread(self) -> float:
        """Largest over smallest choice of the quarters, which hold a quarter of the images."""
        values = [fit.value for fit in self.quarters]
        return max(values) / min(values)

    def as_record(self) -> dict[str, Any]:
        """Return plain data for JSON; None stands for an open end."""
        return {
            "kernel": self.family,
            "degree": self.degree,
            "count": self.count,
            "parameter": self.parameter,
            "unit": self.unit,
            **_fit_record(self.fit),
            "constants": dict(self.constants),
            "target_variance": self.target_variance,
            "explained": self.explained,
            "mean_student": self.mean_student,
            "mean_teacher": self.mean_teacher,
            "correlation": self.correlation,
            "quarters": [_fit_record(fit) for fit in self.quarters],
            "spread": self.spread,
            "compared": None if self.compared is None else list(self.compared),
            "curve": [list(point) for point in self.curve],
        }


def calibrate(
    student: Tensor,
    teacher: Tensor,
    *,
    teacher_kernel: Kernel,
    family: Family = "polynomial",
    degree: int = 3,
    compare_with: float | None = None,
) -> Calibration:
    """Choose the constants of the student's kernel.

    Computed on the CPU, in float64 up to 4096 images and in float32 above; two matrices of count x
    count are held throughout.

    Args:
        student: Embeddings of the untouched student, (n, width), not normalised.
        teacher: Embeddings of the teacher for the same images, (n, teacher width).
        teacher_kernel: Kernel that makes the target of the teacher's embeddings.
        family: Kernel whose constants are wanted.
        degree: Power of the polynomial kernel.
        compare_with: A rho or sigma whose loss to report as well.

    Raises:
        DataError: If there are too few images, or embeddings are not finite or all equal.
        ValueError: If the shapes do not fit.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"embeddings must be (n, width) each, not {tuple(student.shape)}, "
            f"{tuple(teacher.shape)}"
        )
    count = len(student)
    if count < MIN_IMAGES:
        raise DataError(
            f"{count} images are too few to calibrate a kernel; {MIN_IMAGES} is the least.",
            "Take some hundred (--count).",
        )
    dtype = torch.float64 if count <= FLOAT64_IMAGES else torch.float32
    x, y = (
        _checked(values, name, dtype)
        for values, name in ((student, "student"), (teacher, "teacher"))
    )
    with torch.no_grad():
        target = teacher_kernel.to("cpu")(y).to(dtype)  # (n, n)
        gap = GapCurve(x, target, family, degree)
        fit, curve = _fit(gap)
        quarters = tuple(
            _fit(GapCurve(x[part::4], target[part::4, part::4], family, degree))[0]
            for part in range(4)
        )
        compared = None
        if compare_with is not None:
            compared = (compare_with, gap.loss(math.log10(compare_with / gap.unit_value)))
        mean_student, correlation = gap.describe(math.log10(fit.value / gap.unit_value))
    return Calibration(
        family=family,
        degree=degree if family == "polynomial" else None,
        count=count,
        unit=gap.unit,
        fit=fit,
        constants=_constants(family, fit.value, gap.unit),
        curve=curve,
        target_variance=gap.target_variance,
        quarters=quarters,
        compared=compared,
        mean_student=mean_student,
        mean_teacher=gap.target_mean,
        correlation=correlation,
    )


def _fit(gap: GapCurve) -> tuple[Fit, tuple[tuple[float, float], ...]]:
    grid = np.linspace(*_DECADES[gap.family], _GRID_POINTS)
    losses = np.array([gap.loss(float(point)) for point in grid])
    limits = (gap.loss(-math.inf), gap.loss(math.inf))
    place, lowest = _refined(gap.loss, grid, losses)
    infimum = min(lowest, *limits)
    bound = infimum * (1 + NEAR) + NEGLIGIBLE * gap.target_variance
    left = _end_of_plateau(gap.loss, grid[grid < place][::-1], place, bound, limits[0])
    right = _end_of_plateau(gap.loss, grid[grid > place], place, bound, limits[1])
    optimum, chosen = _choose(place, left, right)

    def value(log_value: float) -> float:
        return float(gap.unit_value * 10.0**log_value)

    fit = Fit(
        value=value(chosen),
        loss=gap.loss(chosen),
        optimum=optimum,
        lowest_loss=infimum,
        lowest_at=value(place) if lowest < min(limits) else None,
        near=(None if left is None else value(left), None if right is None else value(right)),
        limits=limits,
    )
    curve = tuple(
        (value(float(point)), float(loss)) for point, loss in zip(grid, losses, strict=True)
    )
    return fit, curve


def _refined(
    loss: Callable[[float], float], grid: np.ndarray[Any, Any], losses: np.ndarray[Any, Any]
) -> tuple[float, float]:
    """Return place and loss of the lowest point between the neighbours of the grid's lowest."""
    best = int(losses.argmin())
    bounds = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    if found.fun < losses[best]:
        return float(found.x), float(found.fun)
    return float(grid[best]), float(losses[best])


def _end_of_plateau(
    loss: Callable[[float], float],
    outwards: np.ndarray[Any, Any],
    start: float,
    bound: float,
    limit: float,
) -> float | None:
    """Walk from the lowest point to where the loss leaves the plateau; None if it never does."""
    inside = start
    if loss(start) > bound:
        # Only a limit reaches the infimum, from the far side of this end or of the other.
        return None if limit <= bound else start
    for point in outwards:
        if loss(float(point)) > bound:
            return float(brentq(lambda at: loss(at) - bound, inside, float(point), xtol=1e-9))
        inside = float(point)
    return None if limit <= bound else inside


def _choose(place: float, left: float | None, right: float | None) -> tuple[Optimum, float]:
    if left is not None and right is not None:
        return "interior", place
    if left is not None:
        return "infinity", left
    if right is not None:
        return "zero", right
    # Nothing speaks for any value: inner product and offset in balance, or the median distance.
    return "flat", 0.0


def _constants(family: Family, value: float, unit: float) -> dict[str, float]:
    if family == "gaussian":
        return {"sigma": value}
    coef0 = 1 / (1 + value * unit)
    return {"gamma": value * coef0, "coef0": coef0}


def _checked(values: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    wide = values.detach().to("cpu", dtype)
    broken = (~wide.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise DataError(
            f"the {name} embedding of image {broken[0]} is not finite "
            f"({len(broken)} of {len(wide)} are not).",
            f"Check the weights of the {name} and the precision it runs in.",
        )
    size = float(wide.square().mean().sqrt())
    # Rounding of float32 towers on one and the same picture stays below this.
    if float((wide - wide[0]).abs().max()) <= 1e-6 * size:
        raise DataError(
            f"the {name} embeddings of all {len(wide)} images are equal.",
            f"Check that the images differ and that the {name} is the right model.",
        )
    return wide


def _fit_record(fit: Fit) -> dict[str, Any]:
    return {
        "value": fit.value,
        "loss": fit.loss,
        "optimum": fit.optimum,
        "lowest_loss": fit.lowest_loss,
        "lowest_at": fit.lowest_at,
        "near": list(fit.near),
        "limits": {"zero": fit.limits[0], "infinity": fit.limits[1]},
    }
