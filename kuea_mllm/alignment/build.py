"""Objectives from their description in a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from kuea_mllm.alignment.kernels_from_recipe import build_kernel
from kuea_mllm.config.align import ObjectiveConfig
from kuea_mllm.errors import RecipeError
from kuea_mllm.kernels import Kernel, PolynomialKernel
from kuea_mllm.objectives import (
    CkaTerm,
    DistillTerm,
    FeatureTerm,
    KernelTerm,
    Objective,
    PatchDistillTerm,
    PatchKernelTerm,
    PatchPreservationTerm,
    PatchTerm,
    PooledTerm,
    PreservationTerm,
)
from kuea_mllm.teachers import Teacher
from kuea_mllm.towers.spec import TowerSpec


def build_objective(
    config: ObjectiveConfig, spec: TowerSpec, teachers: Sequence[Teacher]
) -> Objective:
    """Build every term whose weight is not zero.

    Args:
        config: What the recipe says, with `compat` resolved.
        spec: The student.
        teachers: The recipe's `teacher` first.

    Raises:
        RecipeError: If a patch term needs patch tokens that a teacher does not have.
    """
    width = spec.embedding_width
    terms: list[PooledTerm | PatchTerm] = []
    if config.kernel_weight:
        kernels = build_kernels(config, spec, teachers)
        terms.append(KernelTerm(*kernels, weight=config.kernel_weight))
    if config.feature_weight:
        terms.append(FeatureTerm(width, teachers[0].width, weight=config.feature_weight))
    if config.cka_weight:
        terms.append(CkaTerm(weight=config.cka_weight))
    if config.distill_weight:
        widths = [width, *(teacher.width for teacher in teachers)]
        terms.append(DistillTerm(width, widths, weight=config.distill_weight))
    if config.preserve_weight:
        terms.append(PreservationTerm(weight=config.preserve_weight))
    if config.patch_preserve_weight:
        terms.append(PatchPreservationTerm(weight=config.patch_preserve_weight))
    if config.patch_kernel_weight:
        # Tokens have other norms than pooled embeddings, so the recipe's constants do not carry
        # over: the teacher kernel's rule, gamma = 1 / width and coef0 = 1, on both sides.
        student, teacher = (
            PolynomialKernel(1.0 / tokens, 1.0)
            for tokens in (spec.width, _patch_width(teachers[0], "objective.patch_kernel_weight"))
        )
        terms.append(PatchKernelTerm(student, teacher, weight=config.patch_kernel_weight))
    if config.patch_distill_weight:
        key = "objective.patch_distill_weight"
        widths = [spec.width, *(_patch_width(teacher, key) for teacher in teachers)]
        terms.append(PatchDistillTerm(spec.width, widths, weight=config.patch_distill_weight))
    return Objective(terms)


def build_kernels(
    config: ObjectiveConfig, spec: TowerSpec, teachers: Sequence[Teacher]
) -> tuple[Kernel, Kernel]:
    """Build student and teacher kernel, which also define the held-out gap of other objectives."""
    return (
        build_kernel(config.student_kernel, spec.embedding_width),
        build_kernel(config.teacher_kernel, teachers[0].width),
    )


def _patch_width(teacher: Teacher, key: str) -> int:
    if teacher.patch_width is None:
        raise RecipeError(
            f"key '{key}' needs patch tokens, and teacher {teacher.source} has no square grid of "
            "them.",
            "Set it to 0, or take a vision transformer as the teacher.",
        )
    return teacher.patch_width
