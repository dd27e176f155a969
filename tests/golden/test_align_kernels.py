"""Kernel matrices, losses and gradients against the stored float64 references."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from golden_files import prefixes, relative_error, tensors
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor, nn

from kuea_mllm.features import Features
from kuea_mllm.kernels import CosineKernel, GaussianKernel, Kernel, PolynomialKernel
from kuea_mllm.objectives import (
    FeatureTerm,
    KernelTerm,
    Objective,
    PreservationTerm,
    Targets,
    kernel_gap,
)

FILE = "kernels.safetensors"
CASES = prefixes(FILE, ".student")
PRECISIONS = {"float64": (torch.float64, 1e-9), "float32": (torch.float32, 1e-5)}
INPUTS = {
    "student",
    "target",
    "original",
    "poly_params",
    "gauss_sigmas",
    "weights",
    "feature_map",
}

precisions = pytest.mark.parametrize("precision", PRECISIONS)
cases = pytest.mark.parametrize("case", CASES)


class Case:
    """Inputs and references of one case, the inputs in one precision."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        stored = tensors(FILE)
        mine = {
            k.removeprefix(f"{name}."): t for k, t in stored.items() if k.startswith(f"{name}.")
        }
        self.dtype = dtype
        self.inputs = {key: mine[key].to(dtype) for key in INPUTS}
        self.expected = {key: t for key, t in mine.items() if key not in INPUTS}
        self.preserve_weight, self.penalty = (float(w) for w in mine["weights"])

    @property
    def targets(self) -> Targets:
        """Teacher and original embeddings, as an objective takes them."""
        return Targets((Features(self["target"]),), Features(self["original"]))

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    def student_kernel(self, kind: str) -> Kernel:
        if kind == "poly":
            gamma, coef0 = (float(v) for v in self["poly_params"])
            return PolynomialKernel(
                gamma, coef0, trainable=True, parametrisation="direct", dtype=self.dtype
            )
        if kind == "gauss":
            return GaussianKernel(
                float(self["gauss_sigmas"][0]), True, parametrisation="direct", dtype=self.dtype
            )
        return CosineKernel()

    def target_kernel(self, kind: str) -> Kernel:
        if kind == "poly":
            return PolynomialKernel(1 / self["target"].shape[1], 1.0, dtype=self.dtype)
        if kind == "gauss":
            return GaussianKernel(float(self["gauss_sigmas"][1]), dtype=self.dtype)
        return CosineKernel()

    def pairs(self) -> list[str]:
        names = {key.split(".")[0] for key in self.expected}
        return [
            f"{a}-{b}"
            for a, b in product(("poly", "gauss", "cosine"), repeat=2)
            if f"{a}-{b}" in names
        ]


def evaluate_pair(case: Case, pair: str) -> dict[str, Tensor]:
    """Compute every quantity of one pair of kernels."""
    kind, target_kind = pair.split("-")
    student = case["student"].clone().requires_grad_()
    kernel, target_kernel = case.student_kernel(kind), case.target_kernel(target_kind)
    objective = Objective(
        [
            KernelTerm(kernel, target_kernel, weight=case.penalty),
            PreservationTerm(weight=case.preserve_weight),
        ]
    )
    found = objective(Features(student), case.targets)
    parameters = list(objective.parameters())
    grad_student, *grad_parameters = torch.autograd.grad(found.total, [student, *parameters])
    gap = kernel_gap(kernel(student), target_kernel(case["target"]))
    result = {
        "kernel_loss": found.terms["kernel"],
        "preserve_loss": found.terms["preserve"],
        "total": found.total,
        "grad_student_kernel": torch.autograd.grad(gap, student)[0],
        "grad_student_total": grad_student,
    }
    if parameters:
        result["grad_params_total"] = torch.stack(grad_parameters)
    return {f"{pair}.{key}": value for key, value in result.items()}


def evaluate_feature(case: Case) -> dict[str, Tensor]:
    """Compute every quantity of the feature-alignment baseline."""
    student = case["student"].clone().requires_grad_()
    term = FeatureTerm(student.shape[1], case["target"].shape[1], weight=case.penalty)
    term.feature_map = nn.Parameter(case["feature_map"].clone())
    objective = Objective([term, PreservationTerm(weight=case.preserve_weight)])
    found = objective(Features(student), case.targets)
    grads = torch.autograd.grad(found.total, [student, term.feature_map])
    return {
        "feature.feature_loss": found.terms["feature"],
        "feature.preserve_loss": found.terms["preserve"],
        "feature.total": found.total,
        "feature.grad_student_total": grads[0],
        "feature.grad_map_total": grads[1],
    }


def evaluate(case: Case) -> dict[str, Tensor]:
    """Compute every reference of one case except the fit."""
    found: dict[str, Tensor] = {}
    for kind in ("poly", "gauss", "cosine"):
        found[f"k_student.{kind}"] = case.student_kernel(kind)(case["student"])
        found[f"k_target.{kind}"] = case.target_kernel(kind)(case["target"])
    for pair in case.pairs():
        found |= evaluate_pair(case, pair)
    return found | evaluate_feature(case)


def cancellation_floors(case: Case) -> dict[str, float]:
    """Return a tenth of each gradient's natural size, which is loss / variable.

    Near a stationary point (two duplicates among few rows, say) the gradient is a small difference
    of terms of that size, of which float32 cannot keep more digits, whatever the formula.
    """
    floors = {}
    for pair in case.pairs():
        loss = case.expected[f"{pair}.kernel_loss"]
        student = case["student"].abs().max()
        floors[f"{pair}.grad_student_kernel"] = 0.1 * float(loss / student)
        floors[f"{pair}.grad_student_total"] = 0.1 * float(case.penalty * loss / student)
        if f"{pair}.grad_params_total" in case.expected:
            name = "poly_params" if pair.startswith("poly") else "gauss_sigmas"
            floors[f"{pair}.grad_params_total"] = 0.1 * float(
                case.penalty * loss / case[name].abs().min()
            )
    return floors


def test_the_file_holds_cases() -> None:
    assert CASES


@cases
@precisions
def test_every_reference_of_a_case_is_met(case: str, precision: str) -> None:
    dtype, tolerance = PRECISIONS[precision]
    loaded = Case(case, dtype)
    found = evaluate(loaded)
    # Nothing stored may go unchecked: a set with a new quantity fails here.
    assert found.keys() == {k for k in loaded.expected if not k.startswith("fit.")}
    floors = dict.fromkeys(found, 0.0) | (
        cancellation_floors(loaded) if precision == "float32" else {}
    )
    errors = {k: relative_error(found[k], loaded.expected[k], floor=floors[k]) for k in found}
    worst = {key: error for key, error in errors.items() if not error <= tolerance}
    assert not worst
    assert all(value.dtype == dtype for value in found.values())


@cases
def test_only_the_ratio_of_the_parameters_matters(case: str) -> None:
    loaded = Case(case, torch.float64)
    for pair in loaded.pairs():
        if pair.startswith("poly"):
            terms = loaded["poly_params"] * evaluate_pair(loaded, pair)[f"{pair}.grad_params_total"]
            assert abs(float(terms.sum())) <= 1e-12 * float(terms.abs().max())


@pytest.mark.parametrize("case", prefixes(FILE, ".fit.rho"))
def test_fitted_rho_is_the_minimum_of_the_kernel_loss(case: str) -> None:
    loaded = Case(case, torch.float64)
    k_target = loaded.target_kernel("poly")(loaded["target"])

    def gap(log_rho: float) -> tuple[float, float]:
        variable = torch.tensor(log_rho, dtype=torch.float64, requires_grad=True)
        kernel = PolynomialKernel(1.0, 1.0)
        del kernel.gamma
        kernel.gamma = variable.exp()
        value = kernel_gap(kernel(loaded["student"]), k_target)
        (slope,) = torch.autograd.grad(value, variable)
        return float(value.detach()), float(slope)

    # The valley can be narrow against the range of rho, so a coarse search comes first.
    grid = torch.linspace(-16, 10, 105, dtype=torch.float64).tolist()
    best = min(grid, key=lambda log_rho: gap(log_rho)[0])
    step = grid[1] - grid[0]
    bounds = (best - step, best + step)
    rough = minimize_scalar(lambda v: gap(v)[0], bounds=bounds, method="bounded")
    # A minimum is flat: its place is known to 1e-8 by values, to 1e-15 by the root of the slope.
    log_rho = brentq(lambda v: gap(v)[1], *bounds, xtol=1e-15)
    expected_rho, expected_loss = loaded.expected["fit.rho"], loaded.expected["fit.loss"]
    assert abs(rough.x - log_rho) < 1e-4
    rho = torch.tensor(log_rho, dtype=torch.float64).exp()
    assert relative_error(rho, expected_rho) <= 1e-5
    assert relative_error(torch.tensor(gap(log_rho)[0], dtype=torch.float64), expected_loss) <= 1e-9
