"""The projection baseline: least squares in closed form, a batch at a time."""

import pytest
import torch

from kuea_mllm.alignment.projection import fit_projection
from kuea_mllm.errors import TowerError


def batches(teacher, original, size):
    for start in range(0, len(teacher), size):
        yield teacher[start : start + size], original[start : start + size]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    return teacher, weight, noise


def test_a_linear_relation_is_recovered_exactly(data):
    teacher, weight, _ = data
    found = fit_projection(batches(teacher, teacher @ weight.T, 64), ridge=0.0)
    torch.testing.assert_close(found.weight.double(), weight, rtol=1e-6, atol=1e-6)
    assert found.residual < 1e-12
    assert found.images == 200


def test_fit_equals_least_squares_of_a_library(data):
    teacher, weight, noise = data
    original = teacher @ weight.T + noise
    expected = torch.linalg.lstsq(teacher, original)
    found = fit_projection(batches(teacher, original, 33), ridge=0.0)
    torch.testing.assert_close(found.weight.double(), expected.solution.T, rtol=1e-5, atol=1e-6)
    left = (original - teacher @ expected.solution).square().sum() / original.square().sum()
    assert found.residual == pytest.approx(float(left), rel=1e-9)


def test_ridge_does_not_depend_on_the_number_of_images(data):
    teacher, weight, _ = data
    once = fit_projection(batches(teacher, teacher @ weight.T, 50), ridge=0.1)
    twice = fit_projection(
        batches(teacher.repeat(2, 1), (teacher @ weight.T).repeat(2, 1), 50), ridge=0.1
    )
    torch.testing.assert_close(once.weight, twice.weight)
    assert once.weight.norm() < weight.norm()


def test_embedding_that_is_not_finite_is_refused(data):
    teacher, weight, _ = data
    teacher[3, 2] = float("nan")
    with pytest.raises(TowerError, match="not finite"):
        fit_projection(batches(teacher, teacher @ weight.T, 50))


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="no image"):
        fit_projection(iter(()))
