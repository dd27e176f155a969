"""What is minimised: a weighted sum of small terms.

Two kinds, because they need different things. A *pooled* term compares the pooled embeddings of a
whole batch (kernel matrices are over pairs, so it has to see the batch at once, over all
processes). A *patch* term compares the patch tokens of one image at a time and is a mean over
images, so each process and each micro-batch may compute its own part.

Conventions are those of the released KUEA code: the kernel gap is a mean over the *full* n x n
matrix (diagonal included, each pair twice), preservation a mean over the batch of the squared L2
distance (summed over dimensions, not divided by the width).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kuea_mllm.features import Features, resample_patches
from kuea_mllm.kernels import Kernel


@dataclass(frozen=True)
class LossTerms:
    """One evaluation of an objective.

    Attributes:
        total: Weighted sum to call `backward` on, 0-d.
        terms: The unweighted terms by name, 0-d each, detached.
    """

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Targets:
    """What a batch is compared with; carries no gradient.

    Attributes:
        teachers: Features of each teacher; the recipe's `teacher` first.
        original: Features of the frozen original tower.
    """

    teachers: tuple[Features, ...]
    original: Features


class PooledTerm(nn.Module):
    """A loss over the pooled embeddings of one whole batch.

    Args:
        name: What it is called in logs (`loss_<name>`).
        weight: Factor in the total.
    """

    def __init__(self, name: str, weight: float) -> None:
        super().__init__()
        self.name, self.weight = name, weight

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss, 0-d, float32 or wider.

        Args:
            student: Student embeddings, (n, d), not normalised.
            targets: With the pooled embeddings of the same n images.
        """
        raise NotImplementedError


class PatchTerm(nn.Module):
    """A loss over patch tokens: a mean over images, each by itself.

    Args:
        name: What it is called in logs (`loss_<name>`).
        weight: Factor in the total.
        reads_teacher: Whether teacher patch tokens are needed (the original's are always there).
    """

    def __init__(self, name: str, weight: float, *, reads_teacher: bool) -> None:
        super().__init__()
        self.name, self.weight, self.reads_teacher = name, weight, reads_teacher

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss, 0-d, float32 or wider.

        Args:
            student: Student patch tokens, (n, patches, width).
            targets: With the patch tokens of the same n images.
        """
        raise NotImplementedError


class Objective(nn.Module):
    """A weighted sum of terms.

    Args:
        terms: Pooled and patch terms; their names must differ.

    Raises:
        ValueError: If two terms have one name, or there is none.
    """

    def __init__(self, terms: Iterable[PooledTerm | PatchTerm]) -> None:
        super().__init__()
        terms = list(terms)
        names = [term.name for term in terms]
        if not terms or len(set(names)) < len(names):
            raise ValueError(f"terms need names of their own, not {names}")
        self.pooled_terms = nn.ModuleList(t for t in terms if isinstance(t, PooledTerm))
        self.patch_terms = nn.ModuleList(t for t in terms if isinstance(t, PatchTerm))

    @property
    def reads_patches(self) -> bool:
        """Whether student and original patch tokens are needed."""
        return len(self.patch_terms) > 0

    @property
    def reads_teacher_patches(self) -> bool:
        """Whether teacher patch tokens are needed."""
        return any(cast(PatchTerm, term).reads_teacher for term in self.patch_terms)

    @property
    def kernels(self) -> tuple[Kernel, Kernel] | None:
        """Student and teacher kernel of the kernel term, None without one."""
        for term in self.pooled_terms:
            if isinstance(term, KernelTerm):
                return term.student_kernel, term.teacher_kernel
        return None

    def pooled(self, student: Tensor, targets: Targets) -> LossTerms:
        """Evaluate the pooled terms on one whole batch; `student` is (n, d)."""
        return _weighted_sum(self.pooled_terms, student, targets)

    def patches(self, student: Tensor, targets: Targets) -> LossTerms:
        """Evaluate the patch terms on some images; `student` is (n, patches, width)."""
        return _weighted_sum(self.patch_terms, student, targets)

    def forward(self, student: Features, targets: Targets) -> LossTerms:
        """Evaluate all terms on one whole batch.

        Raises:
            ValueError: If shapes do not fit, or patch tokens are needed and missing.
        """
        pooled = self.pooled(student.pooled, targets)
        if not self.reads_patches:
            return pooled
        if student.patches is None:
            raise ValueError("the objective reads patch tokens, the student gave none")
        patches = self.patches(student.patches, targets)
        return LossTerms(pooled.total + patches.total, {**pooled.terms, **patches.terms})


class KernelTerm(PooledTerm):
    """KUEA: match the student's kernel matrix to the teacher's.

    Args:
        student_kernel: Kernel of `kuea_mllm.kernels`, possibly trainable.
        teacher_kernel: Kernel of the teacher embeddings; never receives a gradient.
        weight: The coefficient of the paper's Table 7.
    """

    def __init__(self, student_kernel: Kernel, teacher_kernel: Kernel, *, weight: float) -> None:
        super().__init__("kernel", weight)
        self.student_kernel = student_kernel
        self.teacher_kernel = teacher_kernel

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return the mean squared difference of the two kernel matrices."""
        with torch.no_grad():
            k_teacher = self.teacher_kernel(targets.teachers[0].pooled)
        return kernel_gap(self.student_kernel(student), k_teacher)


class PreservationTerm(PooledTerm):
    """Stay near the original embedding (KUEA, section 3.2): squared L2 distance."""

    def __init__(self, *, weight: float) -> None:
        super().__init__("preserve", weight)

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return the mean over images of the squared distance."""
        return preservation_loss(student, targets.original.pooled)


class FeatureTerm(PooledTerm):
    """The feature-alignment baseline (KUEA, equation 18): a trained linear map is the target.

    Args:
        student_width: Width d of the student embeddings.
        teacher_width: Width t of the teacher embeddings.
        weight: Factor in the total.
    """

    def __init__(self, student_width: int, teacher_width: int, *, weight: float) -> None:
        super().__init__("feature", weight)
        self.feature_map = nn.Parameter(torch.empty(student_width, teacher_width))  # (d, t)
        nn.init.normal_(self.feature_map, std=teacher_width**-0.5)

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return the mean squared distance between student and mapped teacher."""
        return feature_loss(student, targets.teachers[0].pooled, self.feature_map)


class CkaTerm(PooledTerm):
    """One minus the linear CKA with the teacher: a kernel alignment without parameters."""

    def __init__(self, *, weight: float) -> None:
        super().__init__("cka", weight)

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return a loss in [0, 1]."""
        return cka_loss(student, targets.teachers[0].pooled)


class DistillTerm(PooledTerm):
    """Multi-teacher distillation in the manner of AM-RADIO, pooled part.

    Each teacher, the original tower among them, gets a head of its own (a two-layer MLP) on the
    student embedding; the loss is the mean over teachers of one minus the cosine, which is what
    AM-RADIO (Ranzinger et al. 2024) takes for its summary features.

    Args:
        student_width: Width of the student embeddings.
        target_widths: Width of the original's and of every teacher's embeddings, in that order.
        weight: Factor in the total.
    """

    def __init__(self, student_width: int, target_widths: Sequence[int], *, weight: float) -> None:
        super().__init__("distill", weight)
        self.heads = nn.ModuleList(_head(student_width, width) for width in target_widths)

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return a loss in [0, 2]."""
        wanted = [targets.original.pooled, *(teacher.pooled for teacher in targets.teachers)]
        student = widened(student)
        with torch.autocast(student.device.type, enabled=False):
            losses = [
                1 - F.cosine_similarity(head(student), widened(target), dim=1).mean()
                for head, target in zip(self.heads, wanted, strict=True)
            ]
        return torch.stack(losses).mean()


class PatchPreservationTerm(PatchTerm):
    """Keep the patch tokens that an MLLM reads near the original's (beyond the paper).

    Proposition 3.2 bounds the pooled embedding only; patch tokens drift freely under it.
    """

    def __init__(self, *, weight: float) -> None:
        super().__init__("patch_preserve", weight, reads_teacher=False)

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return the mean over images and patches of the squared L2 distance (over the width)."""
        original = _patches_of(targets.original)
        _require_same_shape(student, original, "student and original patch tokens", ndim=3)
        return (widened(student) - widened(original)).square().sum(2).mean()


class PatchKernelTerm(PatchTerm):
    """Match, within each image, the kernel matrix over patches to the teacher's (beyond the paper).

    Teacher patches are resampled to the student's grid first.

    Args:
        student_kernel: Kernel over the student's patch tokens.
        teacher_kernel: Kernel over the teacher's; never receives a gradient.
        weight: Factor in the total.
    """

    def __init__(self, student_kernel: Kernel, teacher_kernel: Kernel, *, weight: float) -> None:
        super().__init__("patch_kernel", weight, reads_teacher=True)
        self.student_kernel = student_kernel
        self.teacher_kernel = teacher_kernel

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return the mean over images of the kernel gap over their patches."""
        teacher = resample_patches(_patches_of(targets.teachers[0]), student.shape[1])
        # One call for all images: a loop would launch thousands of tiny kernels in every step.
        with torch.no_grad():
            k_teacher = torch.func.vmap(self.teacher_kernel)(teacher)  # (n, patches, patches)
        k_student = torch.func.vmap(self.student_kernel)(student)
        _require_same_shape(k_student, k_teacher, "kernel matrices of patches", ndim=3)
        return (widened(k_student) - widened(k_teacher)).square().mean()


class PatchDistillTerm(PatchTerm):
    """Multi-teacher distillation in the manner of AM-RADIO, patch-token part.

    Per target 0.9 x cosine distance + 0.1 x smooth L1 between a head of the student's tokens and
    the target's tokens, resampled to the student's grid; the two factors are AM-RADIO's.

    Args:
        student_width: Width of the student's patch tokens.
        target_widths: Token width of the original and of every teacher, in that order.
        weight: Factor in the total.
    """

    def __init__(self, student_width: int, target_widths: Sequence[int], *, weight: float) -> None:
        super().__init__("patch_distill", weight, reads_teacher=True)
        self.heads = nn.ModuleList(_head(student_width, width) for width in target_widths)

    def forward(self, student: Tensor, targets: Targets) -> Tensor:
        """Return the mean over targets, images and patches."""
        wanted = [_patches_of(targets.original), *map(_patches_of, targets.teachers)]
        student = widened(student)
        losses = []
        with torch.autocast(student.device.type, enabled=False):
            for head, tokens in zip(self.heads, wanted, strict=True):
                target = widened(resample_patches(tokens, student.shape[1]))
                guess = head(student)
                cosine = 1 - F.cosine_similarity(guess, target, dim=2).mean()
                losses.append(0.9 * cosine + 0.1 * F.smooth_l1_loss(guess, target))
        return torch.stack(losses).mean()


def kernel_gap(k_student: Tensor, k_teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two kernel matrices.

    Args:
        k_student: Kernel matrix of the student, (n, n).
        k_teacher: Kernel matrix of the teacher, (n, n).

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(k_student, k_teacher, "kernel matrices")
    return (widened(k_student) - widened(k_teacher)).square().mean()


def preservation_loss(student: Tensor, original: Tensor) -> Tensor:
    """Return the mean over the batch of the squared L2 distance to the original embeddings.

    Args:
        student: Embeddings of the trained tower, (n, width), not normalised.
        original: Embeddings of the frozen original tower, (n, width).

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(student, original, "student and original embeddings")
    return (widened(student) - widened(original)).square().sum(1).mean()


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
        mapped = widened(teacher) @ widened(feature_map).T  # (n, d)
    return preservation_loss(student, mapped)


def cka_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the linear centred kernel alignment (Kornblith et al. 2019).

    Args:
        student: Embeddings, (n, d).
        teacher: Embeddings of the same images, (n, t).

    Raises:
        ValueError: If the numbers of rows differ or are below 2.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            f"embeddings must be (n, d) and (n, t), not {student.shape}, {teacher.shape}"
        )
    with torch.autocast(student.device.type, enabled=False):
        # By n x n Gram matrices: batches are smaller than embeddings are wide.
        a, b = (_centred_gram(widened(features)) for features in (student, teacher.detach()))
        scale = a.norm() * b.norm()
        loss: Tensor = 1 - (a * b).sum() / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return loss


def widened(x: Tensor) -> Tensor:
    """Return the tensor in float32 if it is narrower; losses are never computed in half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred_gram(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    gram: Tensor = centred @ centred.T
    return gram


def _head(width: int, target_width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, target_width))


def _patches_of(features: Features) -> Tensor:
    if features.patches is None:
        raise ValueError("patch tokens are needed, and a target source gave none")
    return features.patches


def _weighted_sum(terms: nn.ModuleList, student: Tensor, targets: Targets) -> LossTerms:
    total = widened(student).new_zeros(())
    values = {}
    for module in terms:
        term = cast(PooledTerm | PatchTerm, module)
        value = term(student, targets)
        total = total + term.weight * value
        values[term.name] = value.detach()
    return LossTerms(total, values)


def _require_same_shape(a: Tensor, b: Tensor, what: str, *, ndim: int = 2) -> None:
    # Broadcasting (n, 1) against (n, n) would give a plausible number.
    if a.shape != b.shape or a.ndim != ndim:
        raise ValueError(
            f"{what} must have {ndim} dimensions and one shape, not {tuple(a.shape)}, "
            f"{tuple(b.shape)}"
        )
