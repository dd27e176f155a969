"""What is measured on held-out images."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kuea_mllm.alignment.heldout import HeldOut
from kuea_mllm.diagnostics import linear_cka, relative_token_drift
from kuea_mllm.features import Features
from kuea_mllm.kernels import CosineKernel, PolynomialKernel
from kuea_mllm.objectives import kernel_gap

SIZE, WIDTH, PATCHES, TOKEN_WIDTH = 4, 6, 5, 7
POSITIONS = np.array([1, 4, 5, 9, 11])


class Pictures(torch.utils.data.Dataset):
    def __init__(self, *, as_floats=False):
        random = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (12, 3, SIZE, SIZE), generator=random).byte()
        self.as_floats = as_floats
        self.read = []

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.read.append(index)
        pixels = self.pixels[index]
        return {
            "pixels": pixels.float() / 255 if self.as_floats else pixels,
            "index": index,
            "checksum": 7,
        }


class Encoder(nn.Module):
    def __init__(self, seed=0, width=WIDTH):
        super().__init__()
        torch.manual_seed(seed)
        self.pooled = nn.Linear(3 * SIZE * SIZE, width)
        self.tokens = nn.Linear(3 * SIZE * SIZE, PATCHES * TOKEN_WIDTH)
        self.layers = []

    def forward(self, pixels01):
        assert pixels01.dtype == torch.float32
        assert 0.5 < pixels01.max() <= 1
        return self.pooled(pixels01.flatten(1))

    def features(self, pixels01, layer):
        self.layers.append(layer)
        tokens = self.tokens(pixels01.flatten(1)).view(len(pixels01), PATCHES, TOKEN_WIDTH)
        return Features(self(pixels01), tokens)


class FrozenTowers:
    def __init__(self, original):
        self.teacher, self.original = Encoder(seed=1, width=9), original
        self.seen = []

    def __call__(self, batch):
        self.seen.extend(batch["index"].tolist())
        pixels = batch["pixels"]
        return SimpleNamespace(
            teachers=(Features(self.teacher(pixels), None),),
            original=Features(self.original(pixels), None),
        )


class CachedRows(FrozenTowers):
    """Without an original that could be run again."""

    def __init__(self, original):
        super().__init__(None)
        self._first = original

    def __call__(self, batch):
        self.original = self._first
        held = super().__call__(batch)
        self.original = None
        return held


def hold_out(student, *, targets=None, dataset=None, **changes):
    kernels = (PolynomialKernel(0.5, 1.0, trainable=True), CosineKernel())
    settings = {
        "targets": targets or FrozenTowers(copy.deepcopy(student)),
        "student": student,
        "gauge": kernels,
        "device": torch.device("cpu"),
        "batch_size": 2,
        "patch_layer": -2,
        "precision": "fp32",
    }
    return HeldOut(dataset or Pictures(), POSITIONS, **{**settings, **changes})


def shift(module, by):
    with torch.no_grad():
        module.bias.add_(by)


def test_untouched_student_has_no_drift_and_the_gap_of_the_original():
    measured = hold_out(Encoder()).measure()
    assert measured["heldout_kernel_gap"] == measured["heldout_kernel_gap_original"] > 0
    assert measured["heldout_drift_distance_max"] == measured["heldout_patch_drift"] == 0


def test_drift_of_embeddings_and_of_tokens_are_told_apart():
    student = Encoder()
    heldout = hold_out(student)
    before = heldout.measure()
    shift(student.pooled, 1.0)
    moved = heldout.measure()
    assert moved["heldout_drift_distance_mean"] == pytest.approx(WIDTH**0.5, rel=1e-5)
    assert moved["heldout_kernel_gap_original"] == before["heldout_kernel_gap_original"]
    assert moved["heldout_patch_drift"] == 0
    shift(student.tokens, 1.0)
    assert heldout.measure()["heldout_patch_drift"] > 0.1


def test_measurement_equals_one_over_all_images_at_once():
    student = Encoder()
    original = copy.deepcopy(student)
    heldout = hold_out(student)
    nn.init.normal_(student.pooled.weight)
    nn.init.normal_(student.tokens.weight)
    measured = heldout.measure()
    pixels = Pictures().pixels[POSITIONS].float() / 255
    with torch.no_grad():
        now, then = student.features(pixels, -2), original.features(pixels, -2)
        teacher = Encoder(seed=1, width=9)(pixels)
        gap = kernel_gap(PolynomialKernel(0.5, 1.0)(now.pooled), CosineKernel()(teacher))
    assert measured["heldout_kernel_gap"] == pytest.approx(gap.item(), rel=1e-5)
    assert measured["heldout_cka_teacher"] == pytest.approx(linear_cka(now.pooled, teacher))
    drift = relative_token_drift(now.patches, then.patches)
    assert measured["heldout_patch_drift"] == pytest.approx(drift, rel=1e-5)


def test_tokens_are_kept_where_no_original_can_be_run():
    live_student, student = Encoder(), Encoder()
    live = hold_out(live_student)
    cached = hold_out(student, targets=CachedRows(copy.deepcopy(student)))
    for module in (live_student, student):
        shift(module.tokens, 0.5)
    expected = live.measure()["heldout_patch_drift"]
    assert cached.measure()["heldout_patch_drift"] == pytest.approx(expected, rel=1e-2)


def test_tokens_of_a_student_that_moved_are_not_taken_for_the_originals():
    student = Encoder()
    targets = CachedRows(copy.deepcopy(student))
    shift(student.pooled, 1.0)
    with pytest.raises(ValueError, match="before a checkpoint is loaded"):
        hold_out(student, targets=targets)


def test_original_that_was_put_aside_comes_back_for_the_measurement():
    student = Encoder()
    targets = FrozenTowers(copy.deepcopy(student))
    heldout = hold_out(student, targets=targets)
    moves = []

    class Elsewhere(nn.Module):
        """Stands in for a tower on another device, of which this machine has none."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))
            self.inner = [targets.original]

        def to(self, device):
            moves.append(torch.device(device).type)
            return self

        def features(self, pixels01, layer):
            assert moves == ["cpu"]
            return self.inner[0].features(pixels01, layer)

    heldout._original = Elsewhere()
    assert heldout.measure()["heldout_patch_drift"] == 0
    assert moves == ["cpu", "meta"]


def test_only_the_held_out_images_are_read_and_only_once():
    dataset, student = Pictures(), Encoder()
    targets = FrozenTowers(copy.deepcopy(student))
    heldout = hold_out(student, dataset=dataset, targets=targets)
    heldout.measure()
    assert dataset.read == targets.seen == POSITIONS.tolist()
    assert heldout.count == len(POSITIONS)
    assert heldout.images(3).shape == (3, SIZE, SIZE, 3)
    assert heldout.images(3).dtype == np.uint8
    expected = dataset.pixels[POSITIONS[:3]].permute(0, 2, 3, 1).numpy()
    assert (heldout.images(3) == expected).all()


def test_float_pixels_measure_the_same():
    # The values differ from those of uint8 by nothing: both are divided by 255 in float32.
    student = Encoder()
    from_floats = hold_out(student, dataset=Pictures(as_floats=True))
    assert from_floats.measure() == hold_out(student).measure()
    assert (from_floats.images(5) == hold_out(student).images(5)).all()


def test_no_patch_layer_measures_no_tokens():
    student = Encoder()
    measured = hold_out(student, patch_layer=None).measure()
    assert "heldout_patch_drift" not in measured
    assert student.layers == []


def test_bf16_rounds_student_and_original_alike():
    student = Encoder()
    rough, fine = hold_out(student, precision="bf16"), hold_out(student)
    measured = rough.measure()
    assert measured["heldout_drift_distance_max"] == measured["heldout_patch_drift"] == 0
    assert not rough.original.equal(fine.original)
    assert rough.original.dtype == torch.float32


def test_measuring_leaves_the_student_as_it_was():
    student = Encoder().train()
    hold_out(student).measure()
    assert student.training
    assert torch.is_grad_enabled()
    assert not hold_out(student).embed().requires_grad


def test_kernel_matrices_are_of_the_first_images():
    matrices = hold_out(Encoder()).kernel_matrices(count=3)
    assert {name: matrix.shape for name, matrix in matrices.items()} == dict.fromkeys(
        ("original", "aligned", "teacher"), (3, 3)
    )
    assert matrices["original"].equal(matrices["aligned"])


def test_one_image_is_too_few():
    with pytest.raises(ValueError, match="two held-out images"):
        HeldOut(
            Pictures(),
            np.array([1]),
            targets=FrozenTowers(Encoder()),
            student=Encoder(),
            gauge=(CosineKernel(), CosineKernel()),
            device=torch.device("cpu"),
            batch_size=2,
            patch_layer=None,
            precision="fp32",
        )
