"""One update against plain autograd on the whole batch, for every term alone."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from kuea_mllm.alignment.step import WholeBatchStep
from kuea_mllm.alignment.targets import Targets
from kuea_mllm.features import Features
from kuea_mllm.kernels import CosineKernel, GaussianKernel, PolynomialKernel
from kuea_mllm.objectives import (
    CkaTerm,
    DistillTerm,
    FeatureTerm,
    KernelTerm,
    Objective,
    PatchDistillTerm,
    PatchKernelTerm,
    PatchPreservationTerm,
    PreservationTerm,
)

IMAGES, EMBEDDING, TOKEN, TEACHER = 7, 5, 6, 4


class Model(nn.Module):
    """A student of one layer for each output, with four patches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pooled = nn.Linear(12, EMBEDDING)
        self.patches = nn.Linear(3, TOKEN)
        self.seen = []
        self.double()

    def forward(self, pixels, with_patches=False):
        self.seen.append(len(pixels))
        tokens = self.patches(pixels.unflatten(1, (4, 3))) if with_patches else None
        return Features(self.pooled(pixels).tanh(), tokens)


def fixed_targets(batch):
    """Smooth functions of the pixels, so that each piece of a batch gets its own rows."""
    pixels = batch["pixels"]
    tokens = pixels.unflatten(1, (4, 3))
    pad = torch.cat([tokens, tokens.square()], 2)
    teachers = tuple(
        Features((k + pixels[:, :TEACHER]).sin(), (k + pad[..., :TEACHER]).cos()) for k in range(2)
    )
    return Targets(teachers, Features(pixels[:, :EMBEDDING].cos(), pad))


def term(name):
    polynomial = PolynomialKernel(0.3, 0.5, trainable=True, dtype=torch.float64)
    gaussian = GaussianKernel(2.0, trainable=True, dtype=torch.float64)
    torch.manual_seed(1)
    widths = [EMBEDDING, TEACHER, TEACHER]
    made = {
        "kernel": lambda: KernelTerm(polynomial, CosineKernel(), weight=0.5),
        "gaussian kernel": lambda: KernelTerm(gaussian, CosineKernel(), weight=2.0),
        "preserve": lambda: PreservationTerm(weight=0.7),
        "feature": lambda: FeatureTerm(EMBEDDING, TEACHER, weight=0.3),
        "cka": lambda: CkaTerm(weight=1.5),
        "distill": lambda: DistillTerm(EMBEDDING, widths, weight=0.4),
        "patch_preserve": lambda: PatchPreservationTerm(weight=0.2),
        "patch_kernel": lambda: PatchKernelTerm(polynomial, CosineKernel(), weight=3.0),
        "patch_distill": lambda: PatchDistillTerm(TOKEN, [TOKEN, TEACHER, TEACHER], weight=0.6),
    }
    return made[name]().double()


TERMS = [
    "kernel",
    "gaussian kernel",
    "preserve",
    "feature",
    "cka",
    "distill",
    "patch_preserve",
    "patch_kernel",
    "patch_distill",
]
EVERY = [name for name in TERMS if name != "gaussian kernel"]


def make(names):
    return Model(), Objective([term(name) for name in names])


def batch_of(count=IMAGES):
    generator = torch.Generator().manual_seed(2)
    return {"pixels": torch.randn(count, 12, generator=generator, dtype=torch.float64)}


def gradients(model, objective):
    parameters = [*model.named_parameters(), *objective.named_parameters()]
    return {name: p.grad for name, p in parameters if p.grad is not None and p.grad.any()}


def by_step(names, micro_batch_size=None):
    model, objective = make(names)
    step = WholeBatchStep(
        objective,
        fixed_targets,
        autocast=nullcontext,
        backward=lambda loss: loss.backward(),
        no_sync=lambda _: nullcontext(),
        micro_batch_size=micro_batch_size,
    )
    return step(model, batch_of()), gradients(model, objective), model


def by_autograd(names):
    model, objective = make(names)
    batch = batch_of()
    loss = objective(model(batch["pixels"], objective.reads_patches), fixed_targets(batch))
    loss.total.backward()
    return loss, gradients(model, objective)


@pytest.mark.parametrize("micro", [None, 7, 3, 1])
@pytest.mark.parametrize("names", [[name] for name in TERMS] + [EVERY], ids="+".join)
def test_step_gives_loss_and_gradients_of_plain_autograd(names, micro):
    expected, expected_gradients = by_autograd(names)
    found, found_gradients, _ = by_step(names, micro)
    torch.testing.assert_close(found.total, expected.total.detach(), rtol=1e-13, atol=0)
    assert found.terms.keys() == expected.terms.keys()
    for name, value in expected.terms.items():
        torch.testing.assert_close(found.terms[name], value, rtol=1e-13, atol=1e-15)
    assert found_gradients.keys() == expected_gradients.keys()
    assert expected_gradients
    for name, value in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], value, rtol=1e-11, atol=1e-14)


def test_whole_batches_are_embedded_once_and_pieces_twice():
    assert by_step(["kernel"])[2].seen == [7]
    assert by_step(["kernel"], 100)[2].seen == [7]
    assert by_step(["kernel"], 3)[2].seen == [3, 3, 1, 3, 3, 1]


def test_gradients_are_exchanged_with_the_last_piece_only():
    model, objective = make(["kernel", "patch_preserve"])
    quiet, calls = [], []

    class NoSync:
        def __enter__(self):
            quiet.append(True)

        def __exit__(self, *_):
            quiet.pop()

    def backward(loss):
        calls.append(not quiet)
        loss.backward()

    WholeBatchStep(
        objective,
        fixed_targets,
        autocast=nullcontext,
        backward=backward,
        no_sync=lambda _: NoSync(),
        micro_batch_size=3,
    )(model, batch_of())
    assert calls == [False, False, True]


def test_step_adds_to_gradients_that_are_there():
    model, objective = make(["kernel"])
    step = WholeBatchStep(
        objective,
        fixed_targets,
        autocast=nullcontext,
        backward=lambda loss: loss.backward(),
        no_sync=lambda _: nullcontext(),
    )
    step(model, batch_of())
    once = model.pooled.weight.grad.clone()
    step(model, batch_of())
    torch.testing.assert_close(model.pooled.weight.grad, 2 * once)


@pytest.mark.parametrize("names", [["kernel"], ["patch_preserve"]], ids="+".join)
def test_every_tower_parameter_gets_a_gradient(names):
    """Distributed data parallel waits for all of them, also where only patches are read."""
    _, _, model = by_step(names)
    assert model.pooled.weight.grad is not None
