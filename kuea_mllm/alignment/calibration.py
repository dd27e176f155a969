"""Calibrate the student's kernel for a recipe: open, embed, fit, and say where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from kuea_mllm.alignment.kernels_from_recipe import build_kernel
from kuea_mllm.calibrate import Calibration, calibrate
from kuea_mllm.config.align import (
    AlignRecipe,
    GaussianKernelConfig,
    KernelConfig,
    PolynomialKernelConfig,
)
from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.open import open_images
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.devices import choose_device
from kuea_mllm.errors import DataError, RecipeError
from kuea_mllm.kernel_curve import Family
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import SCHEMA_VERSION, current_command, library_versions, utc_now
from kuea_mllm.teachers import load_teacher
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.reading.load import load_tower

_BATCH = 32


def calibrate_recipe(
    recipe: AlignRecipe,
    *,
    count: int = 512,
    family: Family | None = None,
    degree: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Choose the constants of a recipe's student kernel from its own images and models.

    Args:
        recipe: `student.model`, `teacher.model` and `data.images` must be set.
        count: Images to embed, spread over the listing by `runtime.seed`.
        family: Kernel to calibrate; None takes that of the recipe.
        degree: Power of a polynomial kernel; None takes that of the recipe, else 3.
        progress: Show a progress bar.

    Returns:
        The calibration as plain data, with what it was computed from.

    Raises:
        UserError: If an input is wrong.
    """
    recipe = recipe.resolved()
    device = torch.device(choose_device(recipe.runtime.device))
    family, degree = _wanted_kernel(recipe.objective.student_kernel, family, degree)
    student_source = _required(recipe.student.model, "student.model", "--student")
    teacher_source = _required(recipe.teacher.model, "teacher.model", "--teacher")
    data = recipe.data
    source = open_images(
        _required(data.images, "data.images", "--images"),
        format=data.format,
        split=data.split,
        column=data.column,
    )
    tower = load_tower(
        student_source,
        activation=recipe.student.activation,
        heads=recipe.student.heads,
        revision=recipe.student.revision,
    )
    encoder = TowerEncoder(tower).to(device).eval()
    teacher = load_teacher(
        teacher_source,
        readout=recipe.teacher.readout,
        normalisation=recipe.teacher.normalisation or "own",
        student_mean=tower.spec.mean,
        student_std=tower.spec.std,
        image_size=recipe.teacher.image_size,
        revision=recipe.teacher.revision,
    ).to(device)
    positions = spread_positions(len(source), count, seed=recipe.runtime.seed)
    LOGGER.info("%d of %d images, spread over the listing", len(positions), len(source))
    images = ImageDataset(source, ImageTransform.from_spec(tower.spec))
    student_rows, teacher_rows = [], []
    for pixels01, names in _batches(images, positions, device, progress=progress):
        with torch.no_grad():
            student_rows.append(_finite(encoder(pixels01), names, "student"))
            teacher_rows.append(_finite(teacher(pixels01), names, "teacher"))
    found = calibrate(
        torch.cat(student_rows),
        torch.cat(teacher_rows),
        teacher_kernel=build_kernel(
            recipe.objective.teacher_kernel, teacher.width, dtype=torch.float64
        ),
        family=family,
        degree=degree,
        compare_with=_present_value(recipe.objective.student_kernel, encoder.width, family, degree),
    )
    return _record(found, recipe) | {
        "student": {"reference": student_source, "fingerprint": tower.fingerprint},
        "teacher": {
            "reference": teacher_source,
            "fingerprint": teacher.fingerprint,
            "readout": recipe.teacher.readout,
            "normalisation": recipe.teacher.normalisation,
            "image_size": teacher.image_size,
        },
        "images": {"reference": str(data.images), "listing": source.fingerprint()},
    }


def spread_positions(population: int, count: int, *, seed: int) -> NDArray[np.int64]:
    """Return `count` positions, one drawn from each of as many equal parts of a listing.

    Listings are sorted by class, so that a prefix would be a few classes, and an even stride could
    fall into step with an order of its own.
    """
    edges = np.linspace(0, population, min(count, population) + 1).astype(np.int64)
    draws = np.random.default_rng(seed).random(len(edges) - 1)
    return edges[:-1] + (draws * np.diff(edges)).astype(np.int64)


def _wanted_kernel(
    config: KernelConfig, family: Family | None, degree: int | None
) -> tuple[Family, int]:
    if family is None:
        if config.type not in ("polynomial", "gaussian"):
            raise RecipeError(
                f"key 'objective.student_kernel' is of type {config.type}, which has no single "
                "constant to choose.",
                "Pass --kernel polynomial or --kernel gaussian.",
            )
        family = config.type
    if degree is None:
        degree = config.degree if isinstance(config, PolynomialKernelConfig) else 3
    return family, degree


def _present_value(config: KernelConfig, width: int, family: Family, degree: int) -> float | None:
    """Return rho or sigma of the recipe as it is, where that is comparable."""
    if family == "gaussian":
        return config.sigma if isinstance(config, GaussianKernelConfig) else None
    if isinstance(config, PolynomialKernelConfig) and config.degree == degree:
        return (config.gamma or 1.0 / width) / config.coef0
    return None


def _batches(
    images: ImageDataset, positions: NDArray[np.int64], device: torch.device, *, progress: bool
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield pixels in [0, 1] on the device with the names of the images."""
    with tqdm(total=len(positions), desc="embedding", unit="image", disable=not progress) as bar:
        for start in range(0, len(positions), _BATCH):
            chosen = [int(position) for position in positions[start : start + _BATCH]]
            pixels = torch.stack([images[position]["pixels"] for position in chosen])
            # Divided on the device, exactly as in training.
            yield (
                pixels.to(device).to(torch.float32) / 255,
                [images.source.name(position) for position in chosen],
            )
            bar.update(len(chosen))


def _finite(embeddings: Tensor, names: list[str], who: str) -> Tensor:
    wide = embeddings.to("cpu", torch.float32)
    for name, is_finite in zip(names, wide.isfinite().all(1).tolist(), strict=True):
        if not is_finite:
            raise DataError(
                f"the {who} embedding of image {name} is not finite.",
                f"Check the weights of the {who}.",
            )
    return wide


def _required(value: str | None, key: str, flag: str) -> str:
    if value is None:
        raise RecipeError(f"key '{key}' is not set.", f"Pass {flag} or set it in the recipe.")
    return value


def _record(found: Calibration, recipe: AlignRecipe) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "calibration",
        **found.as_record(),
        "recipe_kernel": recipe.objective.student_kernel.model_dump(mode="json"),
        "teacher_kernel": recipe.objective.teacher_kernel.model_dump(mode="json"),
        "compat": recipe.compat,
        "seed": recipe.runtime.seed,
        "versions": library_versions(),
        "command": current_command(),
        "created": utc_now(),
    }
