"""Kernel matrices of some images under several models: plain cosines, or the kernels of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kuea_mllm.errors import TowerError
from kuea_mllm.kernels import cosine_kernel, gaussian_kernel, polynomial_kernel
from kuea_mllm.probing.neighbours import TEACHER

KernelChoice = Literal["cosine", "recorded"]
KernelFunction = Callable[[Tensor], Tensor]


def choose_kernels(
    choice: KernelChoice, manifest: Mapping[str, Any] | None, source: str
) -> dict[str, tuple[KernelFunction, str]]:
    """Return the kernels of student and teacher, each with a text that describes it.

    Args:
        choice: "cosine" compares embeddings by their angle, whatever the towers were trained with;
            "recorded" takes the kernels of the run, with their final constants.
        manifest: The tower's `kuea.json`.
        source: What to call the tower in errors.

    Raises:
        TowerError: If the run's kernels are asked for and not recorded.
    """
    if choice == "cosine":
        plain = (_cosine, "cosine")
        return {"student": plain, "teacher": plain}
    objective = (manifest or {}).get("objective")
    if not isinstance(objective, Mapping) or not objective.get("kernel_weight"):
        raise TowerError(
            f"{source} records no kernels: it was not made by matching kernels with `kuea-mllm "
            "align`.",
            "Leave out --kernel recorded; cosines are compared then.",
        )
    final = ((manifest or {}).get("kernel") or {}).get("final") or {}
    student, teacher = objective.get("student_kernel"), objective.get("teacher_kernel")
    return {
        "student": _recorded(student, final, source),
        "teacher": _recorded(teacher, {}, source),
    }


def kernel_matrices(
    embeddings: Mapping[str, NDArray[np.float32]],
    positions: NDArray[np.int64],
    kernels: Mapping[str, tuple[KernelFunction, str]],
) -> dict[str, NDArray[np.float32]]:
    """Return the kernel matrix of some images under every model, (n, n) each.

    Args:
        embeddings: Name of the model -> (images, width), not normalised.
        positions: Which images.
        kernels: See `choose_kernels`.
    """
    found = {}
    for name, rows in embeddings.items():
        kernel, _ = kernels["teacher" if name == TEACHER else "student"]
        matrix: NDArray[np.float32] = kernel(torch.tensor(rows[positions])).numpy()
        found[name] = matrix
    return found


def mean_gap(matrix: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Return the mean absolute difference of two kernel matrices off the diagonal."""
    off = ~np.eye(len(matrix), dtype=bool)
    return float(np.abs(matrix - other)[off].mean())


def _cosine(x: Tensor) -> Tensor:
    return cosine_kernel(x, x)


def _recorded(config: object, final: Mapping[str, Any], source: str) -> tuple[KernelFunction, str]:
    kind = config.get("type") if isinstance(config, Mapping) else None
    if kind == "cosine":
        return _cosine, "cosine"
    if isinstance(config, Mapping) and kind == "polynomial":
        degree, coef0 = int(config["degree"]), float(final.get("coef0") or config["coef0"])
        gamma = final.get("gamma") or config.get("gamma")

        def polynomial(x: Tensor) -> Tensor:
            # Without a number of its own, gamma is one over the width, as in a recipe.
            scale = 1.0 / x.shape[1] if gamma is None else float(gamma)
            return polynomial_kernel(x, x, gamma=scale, coef0=coef0, degree=degree)

        shown = "1 / width" if gamma is None else f"{float(gamma):.4g}"
        return polynomial, f"polynomial: degree {degree}, gamma {shown}, coef0 {coef0:.4g}"
    if isinstance(config, Mapping) and kind == "gaussian":
        sigma = float(final.get("sigma") or config["sigma"])
        return (lambda x: gaussian_kernel(x, x, sigma=sigma)), f"gaussian: sigma {sigma:.4g}"
    raise TowerError(
        f"the kernels recorded in kuea.json of {source} are of the kind {kind!r}, which is not "
        "drawn.",
        "Leave out --kernel recorded; cosines are compared then.",
    )
