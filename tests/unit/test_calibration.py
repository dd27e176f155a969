"""Calibration on made-up embeddings, where the right answer is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import kuea_mllm.calibrate as calibrate_module
from kuea_mllm.alignment.calibration import spread_positions
from kuea_mllm.calibrate import Calibration, calibrate
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.errors import DataError
from kuea_mllm.kernels import CosineKernel, GaussianKernel, Kernel, PolynomialKernel
from kuea_mllm.objectives import kernel_gap
from kuea_mllm.reporting.calibration import (
    calibration_curve,
    finding,
    override_options,
    recipe_fragment,
)

DOUBLE = torch.float64


def embeddings(count: int = 80, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Of unequal size and not centred, as real embeddings are.
    rows = torch.randn(count, width, generator=generator, dtype=DOUBLE) + 0.4
    return rows * (1 + torch.rand(count, 1, generator=generator, dtype=DOUBLE))


def polynomial(rho: float, degree: int = 3) -> PolynomialKernel:
    return PolynomialKernel(rho, 1.0, degree, dtype=DOUBLE)


def noisy_pair() -> tuple[Tensor, Tensor]:
    x = embeddings()
    return x, x + 0.3 * embeddings(seed=1)


def gap_of(x: Tensor, y: Tensor, student: Kernel, teacher: Kernel) -> float:
    return float(kernel_gap(student(x), teacher(y)))


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
@pytest.mark.parametrize("rho", [1e-3, 0.0167, 0.7])
def test_calibration_recovers_a_planted_rho(rho: float, degree: int) -> None:
    x = embeddings()
    found = calibrate(x, x, teacher_kernel=polynomial(rho, degree), degree=degree)
    assert found.fit.value == pytest.approx(rho, rel=1e-3)
    assert found.constants["gamma"] / found.constants["coef0"] == pytest.approx(rho, rel=1e-3)
    assert found.fit.optimum == "interior"
    assert found.explained == pytest.approx(1.0)
    assert found.correlation == pytest.approx(1.0)
    assert found.spread == pytest.approx(1.0, rel=1e-3)
    low, high = found.fit.near
    assert low is not None
    assert high is not None
    assert low < rho < high


@pytest.mark.parametrize("sigma", [2.0, 4.0, 30.0])
def test_calibration_recovers_a_planted_sigma(sigma: float) -> None:
    x = embeddings()
    kernel = GaussianKernel(sigma, dtype=DOUBLE)
    found = calibrate(x, x, teacher_kernel=kernel, family="gaussian")
    assert found.constants == {"sigma": pytest.approx(sigma, rel=1e-3)}
    assert found.fit.optimum == "interior"
    assert found.degree is None
    distances = torch.pdist(x).median()
    assert found.unit == pytest.approx(float(distances), rel=1e-6)


def test_losses_are_those_of_the_kernels_themselves() -> None:
    x, y = noisy_pair()
    teacher = polynomial(1 / 12)
    found = calibrate(x, y, teacher_kernel=teacher, compare_with=0.5)
    pair = PolynomialKernel(found.constants["gamma"], found.constants["coef0"], dtype=DOUBLE)
    assert found.fit.loss == pytest.approx(gap_of(x, y, pair, teacher), rel=1e-9)
    assert found.compared == (0.5, pytest.approx(gap_of(x, y, polynomial(0.5), teacher), rel=1e-9))
    for value, loss in found.curve[::16]:
        assert loss == pytest.approx(gap_of(x, y, polynomial(value), teacher), rel=1e-7)
    assert found.fit.loss <= min(loss for _, loss in found.curve)
    target = teacher(y)
    cosine = CosineKernel()(x) ** 3
    ones = torch.ones_like(target)
    assert found.fit.limits == (
        pytest.approx(float(kernel_gap(ones, target))),
        pytest.approx(float(kernel_gap(cosine, target))),
    )
    off_diagonal = ~torch.eye(len(x), dtype=torch.bool)
    pairs = torch.stack([pair(x)[off_diagonal], target[off_diagonal]])
    assert found.correlation == pytest.approx(float(torch.corrcoef(pairs)[0, 1]))
    assert found.mean_student == pytest.approx(float(pairs[0].mean()))
    assert found.mean_teacher == pytest.approx(float(pairs[1].mean()))
    share = off_diagonal.to(DOUBLE).mean()
    variance = share * pairs[1].var(correction=0)
    assert found.target_variance == pytest.approx(float(variance))
    assert found.explained == pytest.approx(1 - found.fit.loss / float(variance))


def test_gaussian_losses_are_those_of_the_kernels_themselves() -> None:
    x, y = noisy_pair()
    teacher = polynomial(1 / 12)
    found = calibrate(x, y, teacher_kernel=teacher, family="gaussian", compare_with=3.0)
    assert found.fit.loss == pytest.approx(
        gap_of(x, y, GaussianKernel(found.fit.value, dtype=DOUBLE), teacher), rel=1e-9
    )
    assert found.compared == (
        3.0,
        pytest.approx(gap_of(x, y, GaussianKernel(3.0, dtype=DOUBLE), teacher), rel=1e-9),
    )
    target = teacher(y)
    assert found.fit.limits == (
        pytest.approx(float(kernel_gap(torch.eye(len(x), dtype=DOUBLE), target))),
        pytest.approx(float(kernel_gap(torch.ones_like(target), target))),
    )


def test_scale_of_the_pair_follows_its_rule() -> None:
    x, y = noisy_pair()
    found = calibrate(x, y, teacher_kernel=polynomial(0.1))
    mean_square = float(x.square().sum(1).mean())
    assert found.unit == pytest.approx(mean_square)
    gamma, coef0 = found.constants["gamma"], found.constants["coef0"]
    assert gamma * mean_square + coef0 == pytest.approx(1.0)
    assert gamma / coef0 == pytest.approx(found.fit.value)


def test_rho_goes_with_the_inverse_square_of_the_embeddings() -> None:
    x, y = noisy_pair()
    found = calibrate(x, y, teacher_kernel=polynomial(0.1))
    larger = calibrate(10 * x, y, teacher_kernel=polynomial(0.1))
    assert larger.fit.value == pytest.approx(found.fit.value / 100, rel=1e-5)
    assert larger.fit.loss == pytest.approx(found.fit.loss)


def cosine_target() -> Calibration:
    """The target is beyond every rho: a cosine of high power."""
    x = embeddings()
    return calibrate(x, x, teacher_kernel=polynomial(1e9, degree=5))


def test_a_curve_without_minimum_gives_the_smallest_rho_near_its_limit() -> None:
    found = cosine_target()
    assert found.fit.optimum == "infinity"
    assert found.fit.near == (found.fit.value, None)
    assert found.fit.lowest_loss == pytest.approx(found.fit.limits[1])
    tolerance = 0.01 * found.fit.lowest_loss + 1e-4 * found.target_variance
    assert found.fit.loss == pytest.approx(found.fit.lowest_loss + tolerance, rel=1e-6)
    assert all(fit.optimum == "infinity" for fit in found.quarters)


def test_a_perfect_fit_in_the_limit_is_found_without_dividing_by_nothing() -> None:
    x = embeddings()
    found = calibrate(x, x, teacher_kernel=polynomial(1e12))
    assert found.fit.optimum == "infinity"
    assert found.fit.limits[1] < 1e-15
    assert found.explained == pytest.approx(1 - 1e-4, abs=1e-6)


def unlike_each_other() -> Calibration:
    """No pair of images is alike for the teacher, and not in the student's way: sigma -> 0."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(80, 600, generator=generator, dtype=DOUBLE)
    return calibrate(embeddings(), y, teacher_kernel=CosineKernel(), family="gaussian")


def test_a_bandwidth_that_should_vanish_gives_the_largest_near_zero() -> None:
    found = unlike_each_other()
    assert found.fit.optimum == "zero"
    assert found.fit.near == (None, found.fit.value)
    assert found.fit.loss <= 1.011 * found.fit.limits[0]


def indistinct_student() -> Calibration:
    """All student embeddings are nearly one: the kernel is one everywhere, for every rho."""
    x = torch.ones(80, 12, dtype=DOUBLE) + 1e-4 * embeddings()
    return calibrate(x, embeddings(seed=1), teacher_kernel=polynomial(0.1))


def test_a_flat_curve_is_reported_as_such() -> None:
    found = indistinct_student()
    assert found.fit.optimum == "flat"
    assert found.fit.near == (None, None)
    assert found.fit.value == pytest.approx(1 / found.unit)


def test_calibration_is_deterministic() -> None:
    x, y = noisy_pair()
    first, second = (calibrate(x, y, teacher_kernel=polynomial(0.1)) for _ in range(2))
    assert first == second


def test_quarters_are_calibrations_of_their_own() -> None:
    x, y = noisy_pair()
    found = calibrate(x, y, teacher_kernel=polynomial(0.1))
    alone = calibrate(x[1::4], y[1::4], teacher_kernel=polynomial(0.1))
    assert len(found.quarters) == 4
    assert found.quarters[1].value == pytest.approx(alone.fit.value, rel=1e-5)
    values = [fit.value for fit in found.quarters]
    assert found.spread == pytest.approx(max(values) / min(values))
    assert found.spread > 1


def test_many_images_are_calibrated_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noisy_pair()
    exact = calibrate(x, y, teacher_kernel=polynomial(0.1))
    monkeypatch.setattr(calibrate_module, "FLOAT64_IMAGES", 10)
    rounded = calibrate(x, y, teacher_kernel=polynomial(0.1))
    assert rounded != exact
    assert rounded.fit.value == pytest.approx(exact.fit.value, rel=2e-3)
    assert rounded.fit.loss == pytest.approx(exact.fit.loss, rel=1e-4)


def test_rows_are_taken_in_blocks_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noisy_pair()
    whole = calibrate(x, y, teacher_kernel=polynomial(0.1))
    monkeypatch.setattr("kuea_mllm.kernel_curve._BLOCK_ROWS", 7)
    assert calibrate(x, y, teacher_kernel=polynomial(0.1)).fit.value == pytest.approx(
        whole.fit.value, rel=1e-6
    )


def with_hole(x: Tensor) -> Tensor:
    x = x.clone()
    x[5, 2] = float("nan")
    return x


BAD = {
    "two images": (embeddings()[:2], embeddings()[:2], "2 images are too few"),
    "not a number": (with_hole(embeddings()), embeddings(), "student embedding of image 5"),
    "not a number in the teacher": (embeddings(), with_hole(embeddings()), "teacher embedding"),
    "constant student": (torch.ones(80, 12), embeddings(), "student embeddings of all 80 images"),
    "all zero": (torch.zeros(80, 12), embeddings(), "student embeddings of all 80 images"),
    "constant teacher": (embeddings(), torch.ones(80, 12), "teacher embeddings of all 80 images"),
    "teacher without angles": (
        embeddings(),
        torch.arange(1.0, 81.0)[:, None].expand(-1, 3),
        "teacher's kernel is the same for every pair",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_embeddings_that_say_nothing_are_refused(name: str) -> None:
    student, teacher, message = BAD[name]
    with pytest.raises(DataError, match=message):
        calibrate(student, teacher, teacher_kernel=CosineKernel())


def test_mostly_equal_images_have_no_median_distance() -> None:
    x = embeddings()
    x[:70] = x[0]
    with pytest.raises(DataError, match="more than half"):
        calibrate(x, embeddings(), teacher_kernel=CosineKernel(), family="gaussian")


def test_embeddings_of_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        calibrate(embeddings(80), embeddings(79), teacher_kernel=CosineKernel())


@pytest.mark.parametrize(("population", "count"), [(1000, 100), (103, 100), (50, 64), (20, 20)])
def test_positions_are_distinct_and_one_from_each_part(population: int, count: int) -> None:
    positions = spread_positions(population, count, seed=0)
    taken = min(population, count)
    assert len(set(positions.tolist())) == taken
    parts = torch.arange(taken + 1).double() * population / taken
    assert all(
        int(parts[k]) <= position < int(parts[k + 1]) for k, position in enumerate(positions)
    )
    assert positions.tolist() == spread_positions(population, count, seed=0).tolist()


def test_another_seed_takes_other_images() -> None:
    assert (
        spread_positions(1000, 50, seed=0).tolist() != spread_positions(1000, 50, seed=1).tolist()
    )


def record_of(found: Calibration, **recipe_kernel: Any) -> dict[str, Any]:
    kernel = recipe_kernel or {"type": "polynomial", "degree": 3, "gamma": 1.0, "coef0": 1.0}
    # What is written to disk and read back is what is reported.
    return json.loads(json.dumps(found.as_record() | {"recipe_kernel": kernel}, allow_nan=False))


def test_each_kind_of_curve_has_its_sentence_and_figure() -> None:
    x, y = noisy_pair()
    cases = {
        "a minimum inside the range": calibrate(x, y, teacher_kernel=polynomial(0.1)),
        "-> infinity (the cosine to the power of 3)": cosine_target(),
        "-> 0 (every image like itself only)": unlike_each_other(),
        "The curve is flat": indistinct_student(),
    }
    for text, found in cases.items():
        record = record_of(found)
        assert text in finding(record)
        assert ("gamma / coef0" in finding(record)) == (found.family == "polynomial")
        (axes,) = calibration_curve(record).axes
        labels = [line.get_label() for line in axes.get_lines()]
        assert f"chosen, {found.parameter} = {found.fit.value:.3g}" in labels
        drawn = axes.get_lines()[0].get_xydata()
        assert drawn.tolist() == [list(point) for point in found.curve]


def test_quarters_that_disagree_are_pointed_out() -> None:
    x, y = embeddings(16), embeddings(16, seed=5)
    record = record_of(calibrate(x, y, teacher_kernel=polynomial(0.1)))
    assert record["spread"] > 1.25
    assert "take more images" in finding(record)
    assert "take more images" not in finding(record | {"spread": 1.1})


@pytest.mark.parametrize("family", ["polynomial", "gaussian"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("recipe", ["align/miniworld", "align/vit_l_14"])
def test_lines_to_paste_give_the_kernel_back(family: Any, size: float, recipe: str) -> None:
    x, y = noisy_pair()
    found = calibrate(size * x, y, teacher_kernel=polynomial(0.1), family=family, degree=2)
    loaded = load_recipe(recipe, AlignRecipe)
    present = loaded.objective.student_kernel.model_dump(mode="json")
    record = record_of(found, **present)
    _, *overrides = override_options(record).replace("'", "").split("--set ")
    changed = load_recipe(recipe, AlignRecipe, overrides=[text.strip() for text in overrides])
    kernel = changed.objective.student_kernel.model_dump()
    pasted = yaml.safe_load(recipe_fragment(record))["objective"]["student_kernel"]
    assert {key: kernel[key] for key in pasted} == pasted
    assert {key: pasted[key] for key in found.constants} == pytest.approx(found.constants, rel=1e-5)
    assert pasted.get("degree") == found.degree
