"""The objectives: which terms they have, where gradients go, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kuea_mllm.features import Features
from kuea_mllm.kernels import CosineKernel, GaussianKernel, PolynomialKernel
from kuea_mllm.objectives import (
    CkaTerm,
    DistillTerm,
    FeatureTerm,
    KernelTerm,
    LossTerms,
    Objective,
    PatchDistillTerm,
    PatchKernelTerm,
    PatchPreservationTerm,
    PreservationTerm,
    Targets,
    cka_loss,
    feature_loss,
    kernel_gap,
    preservation_loss,
)

N, D, T, PATCHES, TOKEN = 6, 5, 7, 4, 3
# The first call of a kernel can take seconds on a busy machine.
relaxed = settings(deadline=None)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets(teachers: int = 1) -> Targets:
    return Targets(
        teachers=tuple(
            Features(draws(N, T, seed=10 + k), draws(N, 16, T, seed=20 + k))
            for k in range(teachers)
        ),
        original=Features(draws(N, D, seed=2), draws(N, PATCHES, TOKEN, seed=3)),
    )


def student() -> Features:
    pooled, patches = draws(N, D), draws(N, PATCHES, TOKEN, seed=1)
    return Features(pooled.requires_grad_(), patches.requires_grad_())


def kuea(preserve_weight: float = 1.0) -> Objective:
    kernel = KernelTerm(
        PolynomialKernel(0.1, 0.5, trainable=True), PolynomialKernel(1 / T, 1.0), weight=0.5
    )
    return Objective([kernel, PreservationTerm(weight=preserve_weight)])


def every_term() -> Objective:
    torch.manual_seed(0)
    return Objective(
        [
            *kuea().pooled_terms,  # type: ignore[list-item]
            FeatureTerm(D, T, weight=0.2),
            CkaTerm(weight=0.3),
            DistillTerm(D, [D, T, T], weight=0.4),
            PatchPreservationTerm(weight=0.1),
            PatchKernelTerm(PolynomialKernel(0.1, 0.5), CosineKernel(), weight=0.6),
            PatchDistillTerm(TOKEN, [TOKEN, T, T], weight=0.7),
        ]
    )


def weights(objective: Objective) -> dict[str, float]:
    terms = [*objective.pooled_terms, *objective.patch_terms]
    return {term.name: term.weight for term in terms}  # type: ignore[misc]


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    objective = every_term()
    found = objective(student(), targets(2))
    assert found.terms.keys() == weights(objective).keys()
    assert len(found.terms) == 8
    expected = sum(weight * found.terms[name] for name, weight in weights(objective).items())
    torch.testing.assert_close(found.total.detach(), torch.as_tensor(expected))


def test_pooled_and_patch_parts_add_up_to_the_whole() -> None:
    objective, features, wanted = every_term(), student(), targets(2)
    assert features.patches is not None
    parts: list[LossTerms] = [
        objective.pooled(features.pooled, wanted),
        objective.patches(features.patches, wanted),
    ]
    whole = objective(features, wanted)
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)


def test_terms_are_detached_and_total_is_not() -> None:
    found = every_term()(student(), targets(2))
    assert found.total.requires_grad
    assert not any(value.requires_grad for value in found.terms.values())


def test_first_update_comes_from_the_kernel_term_alone() -> None:
    pooled = draws(N, D).requires_grad_()
    equal = Targets(targets().teachers, Features(pooled.detach().clone()))
    found = kuea().pooled(pooled, equal)
    assert float(found.terms["preserve"]) == 0.0
    (gradient,) = torch.autograd.grad(found.total, pooled)
    kernel_only = kuea(0.0).pooled(pooled, equal)
    assert torch.equal(gradient, torch.autograd.grad(kernel_only.total, pooled)[0])


def test_kernel_and_original_receive_no_gradient_from_the_teachers_side() -> None:
    teacher = draws(N, T).requires_grad_()
    wanted = Targets((Features(teacher),), targets().original)
    kernel = PolynomialKernel(1 / T, 1.0, trainable=True)
    term = KernelTerm(PolynomialKernel(0.1, 0.5, trainable=True), kernel, weight=1.0)
    Objective([term]).pooled(student().pooled, wanted).total.backward()
    assert teacher.grad is None
    assert all(parameter.grad is None for parameter in kernel.parameters())
    assert all(parameter.grad is not None for parameter in term.student_kernel.parameters())


def test_every_parameter_of_every_term_is_trained() -> None:
    objective = every_term()
    objective(student(), targets(2)).total.backward()
    untrained = [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    # The last bias of a smooth L1 or cosine head gets one as well: nothing is left out.
    assert untrained == []


def test_objective_says_what_it_reads() -> None:
    assert not kuea().reads_patches
    preserving = Objective([PreservationTerm(weight=1.0), PatchPreservationTerm(weight=1.0)])
    assert preserving.reads_patches
    assert not preserving.reads_teacher_patches
    assert preserving.kernels is None
    assert every_term().reads_teacher_patches
    found = kuea().kernels
    assert found is not None
    assert [kernel.constants()["gamma"] for kernel in found] == pytest.approx([0.1, 1 / T])


def test_missing_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="student gave none"):
        every_term()(Features(draws(N, D)), targets(2))
    bare = Targets(tuple(Features(t.pooled) for t in targets(2).teachers), targets().original)
    with pytest.raises(ValueError, match="target source gave none"):
        every_term()(student(), bare)


@pytest.mark.parametrize("terms", [[], [CkaTerm(weight=1.0), CkaTerm(weight=2.0)]])
def test_terms_need_names_of_their_own(terms: list[CkaTerm]) -> None:
    with pytest.raises(ValueError, match="names of their own"):
        Objective(terms)


def test_number_of_heads_must_be_that_of_the_targets() -> None:
    distill = Objective([DistillTerm(D, [D, T], weight=1.0)])
    with pytest.raises(ValueError, match="longer"):
        distill.pooled(draws(N, D), targets(2))


@pytest.mark.parametrize(
    "kernel", [PolynomialKernel(0.1, 0.5), GaussianKernel(2.0), CosineKernel()]
)
def test_matching_kernels_have_no_gap(kernel: nn.Module) -> None:
    x = draws(N, D)
    assert float(kernel_gap(kernel(x), kernel(x.clone()))) == 0.0


def test_one_image_has_no_gap() -> None:
    # The diagonal is one on both sides whatever the features, so a batch of one teaches nothing.
    pooled = draws(1, D).requires_grad_()
    found = kuea(0.0).pooled(pooled, Targets((Features(draws(1, T)),), Features(draws(1, D))))
    assert float(found.total.detach()) == 0.0
    assert not torch.autograd.grad(found.total, pooled)[0].any()


@relaxed
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_losses_follow_their_formulas(n: int, d: int, t: int) -> None:
    x, y, w, o = draws(n, d), draws(n, t, seed=1), draws(d, t, seed=2), draws(n, d, seed=3)
    expected = sum(((x[i] - w @ y[i]) ** 2).sum() for i in range(n)) / n
    torch.testing.assert_close(feature_loss(x, y, w), torch.as_tensor(expected))
    expected = sum(((x[i] - o[i]) ** 2).sum() for i in range(n)) / n
    torch.testing.assert_close(preservation_loss(x, o), torch.as_tensor(expected))


def test_kernel_gap_counts_the_diagonal_and_each_pair_twice() -> None:
    a, b = torch.eye(3), torch.eye(3)
    b[0, 1] = b[1, 0] = 0.6
    assert kernel_gap(a, b).item() == pytest.approx(2 * 0.36 / 9)


def test_cka_ignores_rotation_shift_and_scale() -> None:
    x = draws(N, D).double()
    rotation = torch.linalg.qr(draws(D, D, seed=1).double())[0]
    assert cka_loss(x, 3 * x @ rotation + 2).item() == pytest.approx(0, abs=1e-12)
    other = cka_loss(x, draws(N, T, seed=4).double()).item()
    assert 0.01 < other < 1


def test_cka_equals_the_formula_over_features() -> None:
    x, y = draws(N, D).double(), draws(N, T, seed=1).double()
    xc, yc = x - x.mean(0), y - y.mean(0)
    similarity = (xc.T @ yc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
    assert cka_loss(x, y).item() == pytest.approx(1 - similarity.item())


def test_patch_kernel_is_the_mean_over_images_of_their_gaps() -> None:
    tokens, wanted = draws(N, PATCHES, TOKEN), draws(N, PATCHES, T, seed=1)
    kernel = CosineKernel()
    term = PatchKernelTerm(kernel, kernel, weight=1.0)
    found = term(tokens, Targets((Features(draws(N, T), wanted),), targets().original))
    gaps = [kernel_gap(kernel(tokens[i]), kernel(wanted[i])) for i in range(N)]
    torch.testing.assert_close(found, torch.stack(gaps).mean())


def test_patch_preservation_sums_over_the_width_and_averages_the_rest() -> None:
    original = targets().original
    assert original.patches is not None
    shifted = original.patches + 0.5
    found = PatchPreservationTerm(weight=1.0)(shifted, targets())
    assert found.item() == pytest.approx(TOKEN * 0.25)


def test_distillation_reaches_zero_where_heads_reproduce_the_targets() -> None:
    term = DistillTerm(D, [D, D], weight=1.0)
    term.heads = nn.ModuleList([nn.Identity(), nn.Identity()])
    x = draws(N, D)
    found = term(x, Targets((Features(2 * x),), Features(x)))
    assert found.item() == pytest.approx(0, abs=1e-6)
    opposite = term(x, Targets((Features(-x),), Features(-x)))
    assert opposite.item() == pytest.approx(2)


def test_half_precision_inputs_are_widened() -> None:
    def half(features: Features) -> Features:
        assert features.patches is not None
        return Features(features.pooled.bfloat16(), features.patches.bfloat16())

    wide = targets(2)
    narrow = Targets(tuple(map(half, wide.teachers)), half(wide.original))
    objective = every_term()
    found = objective(half(student()), narrow)
    assert found.total.dtype == torch.float32
    assert {value.dtype for value in found.terms.values()} == {torch.float32}


def test_autocast_does_not_reach_the_losses() -> None:
    objective, features, wanted = every_term(), student(), targets(2)
    plain = objective(features, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        cast = objective(features, wanted)
    for name, value in plain.terms.items():
        assert math.isclose(value.item(), cast.terms[name].item(), rel_tol=1e-6), name


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel matrices"):
        kernel_gap(torch.zeros(4, 4), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="embeddings"):
        preservation_loss(torch.zeros(4, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="embeddings"):
        cka_loss(torch.zeros(4, 3), torch.zeros(1, 3))
