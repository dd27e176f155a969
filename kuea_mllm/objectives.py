"""What is minimised: the gap between two kernel matrices plus the distance to the original tower.

Conventions are those of the released KUEA code: the gap is a mean over the *full* n x n matrix
(diagonal included, each pair twice), preservation a mean over the batch of the squared L2 distance
(summed over dimensions, not divided by the width). Both terms need the whole batch at once, so
gradient accumulation over smaller batches is not equivalent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kuea_mllm.kernels import Kernel


@dataclass(frozen=True)
class LossTerms:
    """One evaluation of an objective.

    Attributes:
        total: Weighted sum to call `backward` on, 0-d.
        terms: The unweighted terms, 0-d each; "kernel" (or "feature"), and "preserve" unless its
            weight is zero.
    """

    total: Tensor
    terms: dict[str, Tensor]


def kernel_gap(k_student: Tensor, k_teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two kernel matrices.

    Args:
        k_student: Kernel matrix of the student, (n, n).
        k_teacher: Kernel matrix of the teacher, (n, n).

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(k_student, k_teacher, "kernel matrices")
    return (_widened(k_student) - _widened(k_teacher)).square().mean()


def preservation_loss(student: Tensor, original: Tensor) -> Tensor:
    """Return the mean over the batch of the squared L2 distance to the original embeddings.

    Args:
        student: Embeddings of the trained tower, (n, width), not normalised.
        original: Embeddings of the frozen original tower, (n, width).

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(student, original, "student and original embeddings")
    return (_widened(student) - _widened(original)).square().sum(1).mean()


def feature_loss(student: Tensor, teacher: Tensor, feature_map: Tensor) -> Tensor:
    """Return the mean squared L2 distance between student and mapped teacher embeddings.

    The feature-alignment baseline (KUEA, equation 18). Sum over dimensions and the missing bias are
    this project's convention: the released code does not contain the baseline.

    Args:
        student: Embeddings of the trained tower, (n, d).
        teacher: Embeddings of the teacher, (n, t).
        feature_map: Linear map from teacher to student, (d, t).

    Raises:
        ValueError: If the shapes do not fit together.
    """
    with torch.autocast(student.device.type, enabled=False):
        mapped = _widened(teacher) @ _widened(feature_map).T  # (n, d)
    return preservation_loss(student, mapped)


class KernelAlignmentObjective(nn.Module):
    """KUEA: match the student's kernel matrix to the teacher's, stay close to the original.

    Args:
        student_kernel: Kernel module of `kuea_mllm.kernels`, possibly trainable.
        teacher_kernel: Kernel of the teacher embeddings; never receives a gradient.
        kernel_weight: Weight of the kernel term (the coefficient of the paper's Table 7).
        preserve_weight: Weight of the preservation term; zero skips it.
    """

    def __init__(
        self,
        student_kernel: Kernel,
        teacher_kernel: Kernel,
        *,
        kernel_weight: float,
        preserve_weight: float,
    ) -> None:
        super().__init__()
        self.student_kernel = student_kernel
        self.teacher_kernel = teacher_kernel
        self.kernel_weight = kernel_weight
        self.preserve_weight = preserve_weight

    def forward(self, student: Tensor, teacher: Tensor, original: Tensor | None) -> LossTerms:
        """Evaluate the objective on one whole batch.

        Args:
            student: Pooled student embeddings, (n, d), not normalised.
            teacher: Teacher embeddings, (n, t), not normalised.
            original: Embeddings of the frozen original tower, (n, d); may be None only when the
                preservation weight is zero.

        Returns:
            The weighted total and the terms "kernel" and "preserve", float32 or wider.

        Raises:
            ValueError: If the shapes do not fit, or `original` is missing.
        """
        with torch.no_grad():
            k_teacher = self.teacher_kernel(teacher)
        gap = kernel_gap(self.student_kernel(student), k_teacher)
        if self.preserve_weight == 0:
            return LossTerms(self.kernel_weight * gap, {"kernel": gap.detach()})
        preserve = _preservation(student, original)
        total = self.preserve_weight * preserve + self.kernel_weight * gap
        return LossTerms(total, {"kernel": gap.detach(), "preserve": preserve.detach()})


class FeatureAlignmentObjective(nn.Module):
    """The feature-alignment baseline: a trained linear map of the teacher is the target.

    Args:
        student_width: Width d of the student embeddings.
        teacher_width: Width t of the teacher embeddings.
        feature_weight: Weight of the feature term.
        preserve_weight: Weight of the preservation term; zero skips it.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        feature_weight: float,
        preserve_weight: float,
    ) -> None:
        super().__init__()
        self.feature_map = nn.Parameter(torch.empty(student_width, teacher_width))  # (d, t)
        nn.init.normal_(self.feature_map, std=teacher_width**-0.5)
        self.feature_weight = feature_weight
        self.preserve_weight = preserve_weight

    def forward(self, student: Tensor, teacher: Tensor, original: Tensor | None) -> LossTerms:
        """Evaluate the baseline on one whole batch; see `KernelAlignmentObjective.forward`.

        Returns:
            The weighted total and the terms "feature" and "preserve".
        """
        gap = feature_loss(student, teacher.detach(), self.feature_map)
        if self.preserve_weight == 0:
            return LossTerms(self.feature_weight * gap, {"feature": gap.detach()})
        preserve = _preservation(student, original)
        total = self.preserve_weight * preserve + self.feature_weight * gap
        return LossTerms(total, {"feature": gap.detach(), "preserve": preserve.detach()})


def _preservation(student: Tensor, original: Tensor | None) -> Tensor:
    if original is None:
        raise ValueError("original embeddings are needed: the preservation weight is not zero")
    return preservation_loss(student, original.detach())


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_same_shape(a: Tensor, b: Tensor, what: str) -> None:
    # Broadcasting (n, 1) against (n, n) would give a plausible number.
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(
            f"{what} must be matrices of one shape, not {tuple(a.shape)}, {tuple(b.shape)}"
        )
