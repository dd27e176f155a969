"""Boxes: between the padded square and the image, intersection over union, reading answers."""

from __future__ import annotations

import ast
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuea_mllm.evaluation.suites.boxes import (
    Box,
    from_pixels,
    iou,
    parse_box,
    rounded,
    to_image,
    to_padded,
)

SIDES = st.integers(1, 4000)
FRACTION = st.floats(0.0, 1.0, allow_nan=False)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    left, right = sorted((draw(FRACTION), draw(FRACTION)))
    top, bottom = sorted((draw(FRACTION), draw(FRACTION)))
    return left, top, right, bottom


def is_close(one: Box, other: Box) -> bool:
    return all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(one, other, strict=True))


@given(boxes(), SIDES, SIDES)
def test_mapping_to_the_square_and_back_is_identity(box: Box, width: int, height: int) -> None:
    assert is_close(to_image(to_padded(box, width, height), width, height), box)


@given(boxes(), SIDES, SIDES)
def test_mapped_boxes_stay_inside_and_ordered(box: Box, width: int, height: int) -> None:
    for mapped in (to_padded(box, width, height), to_image(box, width, height)):
        left, top, right, bottom = mapped
        assert 0.0 <= left <= right <= 1.0
        assert 0.0 <= top <= bottom <= 1.0


@given(boxes(), SIDES)
def test_a_square_image_needs_no_mapping(box: Box, side: int) -> None:
    assert is_close(to_padded(box, side, side), box)
    assert is_close(to_image(box, side, side), box)


@given(boxes(), boxes())
def test_iou_is_symmetric_and_between_0_and_1(one: Box, other: Box) -> None:
    assert 0.0 <= iou(one, other) <= 1.0 + 1e-12
    assert iou(one, other) == pytest.approx(iou(other, one), abs=1e-12)


def has_area(box: Box) -> bool:
    return box[2] - box[0] > 1e-6 and box[3] - box[1] > 1e-6


@given(boxes().filter(has_area))
def test_iou_of_a_box_with_itself_is_one(box: Box) -> None:
    assert iou(box, box) == pytest.approx(1.0)


@given(boxes().filter(has_area), boxes().filter(has_area), SIDES, SIDES)
def test_iou_is_the_same_in_the_square_and_in_the_image(
    one: Box, other: Box, width: int, height: int
) -> None:
    in_square = iou(to_padded(one, width, height), to_padded(other, width, height))
    assert in_square == pytest.approx(iou(one, other), abs=1e-6)


def test_iou_of_boxes_that_touch_or_are_empty_is_zero() -> None:
    assert iou((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)) == 0.0
    assert iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0.0
    assert iou((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("box", "raw"),
    [
        ((0.40, 0.05, 0.50, 0.20), 0.17),
        ((0.40, 0.10, 0.60, 0.40), 0.62),
        ((0.30, 0.30, 0.70, 0.70), 0.75),
    ],
)
def test_a_perfect_model_loses_so_much_where_padding_is_not_mapped_back(
    box: Box, raw: float
) -> None:
    said = to_padded(box, 640, 480)
    assert iou(said, box) == pytest.approx(raw, abs=0.005)
    # Two decimals cost little.
    assert iou(to_image(rounded(said), 640, 480), box) >= 0.935


def test_an_odd_remainder_of_the_padding_goes_to_the_bottom() -> None:
    # 10 x 7 in a square of 10: one row above, two below.
    assert to_padded((0.0, 0.0, 1.0, 1.0), 10, 7) == pytest.approx((0.0, 0.1, 1.0, 0.8))
    assert to_image((0.0, 0.1, 1.0, 0.8), 10, 7) == pytest.approx((0.0, 0.0, 1.0, 1.0))
    assert to_image((0.0, 0.0, 1.0, 0.1), 10, 7) == pytest.approx((0.0, 0.0, 1.0, 0.0))


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.2, 0.3, 0.4]",
        " [0.1,0.2,0.3,0.4]\n",
        "[0, 0, 1, 1]",
        "[0.0, 0., .5, 1e0,]",
        "[\n0.10, 0.20,\n0.30, 0.40]",
    ],
)
def test_a_list_of_four_numbers_is_a_box(text: str) -> None:
    assert parse_box(text) == tuple(map(float, ast.literal_eval(text.strip())))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\u26a0\u26a0\u26a0",
        "[0.1, 0.2, 0.3, 0.4].",
        "The box is [0.1, 0.2, 0.3, 0.4]",
        "(0.1, 0.2, 0.3, 0.4)",
        "0.1, 0.2, 0.3, 0.4",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.3, 0.2, 0.3, 0.4]",
        "[0.3, 0.2, 0.1, 0.4]",
        "[0.1, 0.4, 0.3, 0.2]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 1.01]",
        "[10, 20, 30, 40]",
        "[nan, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 01]",
        "[0.1, 0.2, 0.3, 0.4]]",
        "[__import__('os'), 0, 1, 1]",
        "[" * 100_000,
        "[0." + "1" * 100_000,
    ],
)
def test_anything_else_is_no_box(text: str) -> None:
    assert parse_box(text) is None


@given(st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4))
def test_every_list_that_python_writes_is_read_as_it_is(numbers: list[float]) -> None:
    left, top, right, bottom = numbers
    expected = tuple(numbers) if left < right and top < bottom else None
    assert parse_box(repr(numbers)) == expected


def test_pixels_become_fractions_of_the_image() -> None:
    box = from_pixels([64, 24, 320, 456], 640, 480)
    assert box == pytest.approx((0.1, 0.05, 0.6, 1.0))
    assert rounded((0.126, 0.333, 0.5, 0.999)) == (0.13, 0.33, 0.5, 1.0)


@pytest.mark.parametrize("pixels", [[0, 0, 0, 5], [0, 0, 11, 5], [-1, 0, 5, 5], [0, 3, 5, 5]])
def test_a_box_outside_of_its_image_is_refused(pixels: list[float]) -> None:
    with pytest.raises(ValueError, match="does not lie in an image of 10 x 7"):
        from_pixels(pixels, 10, 7)
