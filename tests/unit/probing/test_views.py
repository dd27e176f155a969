"""Attention and kernel matrices of two towers on the same pictures."""

import numpy as np
import pytest
import torch

from kuea_mllm.data.folder import FolderImages
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import TowerError
from kuea_mllm.kernels import polynomial_kernel
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.images import write_images
from kuea_mllm.probing.attention import _spread, compare_attention
from kuea_mllm.probing.kernel_views import choose_kernels, kernel_matrices, mean_gap
from kuea_mllm.towers.model.attention import attention_maps
from kuea_mllm.towers.reading.load import load_tower

RECORD = {
    "objective": {
        "kernel_weight": 0.5,
        "student_kernel": {"type": "polynomial", "degree": 3, "gamma": 1.0, "coef0": 1.0},
        "teacher_kernel": {"type": "polynomial", "degree": 3, "gamma": None, "coef0": 1.0},
    },
    "kernel": {"final": {"gamma": 0.25, "coef0": 2.0}},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "images"
    write_images(folder, split="train", count=10, seed=0)
    return FolderImages(folder)


def test_numbers_and_maps_are_those_of_the_towers_whatever_the_batch(images):
    original, moved = load_tower(ASSETS / "clip"), load_tower(ASSETS / "clip")
    with torch.no_grad():
        moved.model.vision_model.encoder.layers[-1].self_attn.q_proj.weight.mul_(3.0)
    view = compare_attention(original, moved, images, range(10), drawn=[2, 7], batch_size=3)
    pixels = torch.stack([ImageTransform(32)(images.read(i)) for i in range(10)])
    before, after = (attention_maps(each, pixels).mean(1) for each in (original, moved))
    np.testing.assert_allclose(view.original, before[[2, 7]].numpy(), atol=1e-6)
    np.testing.assert_allclose(view.aligned, after[[2, 7]].numpy(), atol=1e-6)
    cosine = torch.cosine_similarity(before.flatten(1), after.flatten(1)).mean().item()
    assert view.numbers["cosine_mean"] == pytest.approx(cosine, abs=1e-5)
    assert view.numbers["cosine_mean"] < 0.999
    np.testing.assert_array_equal(
        view.images[1], (pixels[7] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    )


def test_spread_is_one_for_an_even_map_and_zero_for_one_patch():
    even, single = torch.full((16,), 0.02), torch.eye(16)[3] * 0.4
    assert _spread(torch.stack([even, single])).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_recorded_kernels_have_the_final_constants_for_the_student_only():
    rows = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    kernels = choose_kernels("recorded", RECORD, "tower")
    found = kernel_matrices({"aligned": rows, "teacher": rows}, np.arange(6), kernels)
    x = torch.tensor(rows)
    student = polynomial_kernel(x, x, gamma=0.25, coef0=2.0, degree=3)
    teacher = polynomial_kernel(x, x, gamma=1 / 8, coef0=1.0, degree=3)
    np.testing.assert_allclose(found["aligned"], student.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["teacher"], teacher.numpy(), rtol=1e-6)


def test_sums_of_kernels_are_refused_by_name():
    record = {"objective": {"kernel_weight": 1, "student_kernel": {"type": "sum"}}}
    with pytest.raises(TowerError, match="of the kind 'sum'"):
        choose_kernels("recorded", record, "tower")


def test_gap_leaves_out_the_diagonal():
    assert mean_gap(np.eye(3), np.full((3, 3), 0.5)) == 0.5
    assert mean_gap(np.eye(3), np.diag([5.0, 6.0, 7.0])) == 0.0
