"""Boxes in fractions of an image, and of the square that LLaVA pads the image to.

LLaVA-1.5 was trained on boxes in the padded square, with the image in the middle; the annotations
refer to the image alone. Comparing the one with the other is what the paper's harness does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as fractions, from the upper left corner."""

_BLANK = r"[ \t\r\n\f]*"
# As Python writes numbers; 01 is none.
_NUMBER = (
    r"([+-]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+"
    r"|0+|[1-9][0-9]*))"
)
_LIST = re.compile(
    rf"\[{_BLANK}{rf'{_BLANK},{_BLANK}'.join([_NUMBER] * 4)}{_BLANK}(?:,{_BLANK})?\]"
)


def parse_box(text: str) -> Box | None:
    """Read an answer that is a box and nothing else.

    Returns:
        The box; None unless the whole answer is a list of four numbers from 0 to 1, the left one
        below the right one and the upper one below the lower one.
    """
    match = _LIST.fullmatch(text.strip())
    if match is None:
        return None
    left, top, right, bottom = (float(number) for number in match.groups())
    is_within = all(0.0 <= value <= 1.0 for value in (left, top, right, bottom))
    if not is_within or left >= right or top >= bottom:
        return None
    return left, top, right, bottom


def from_pixels(pixels: Sequence[float], width: int, height: int) -> Box:
    """Turn left, top, width and height in pixels into fractions of the image.

    Raises:
        ValueError: If the box is empty or does not lie in the image.
    """
    x, y, box_width, box_height = pixels
    right, bottom = x + box_width, y + box_height
    if not (0 <= x < right <= width and 0 <= y < bottom <= height):
        raise ValueError(f"box {list(pixels)} does not lie in an image of {width} x {height}")
    return x / width, y / height, right / width, bottom / height


def rounded(box: Box) -> Box:
    """Round to two decimals, as the paper's harness does with annotations."""
    left, top, right, bottom = (round(value, 2) for value in box)
    return left, top, right, bottom


def to_image(box: Box, width: int, height: int) -> Box:
    """Map a box from the padded square to the image, cutting off what lies in the padding."""
    side, left, top = _padding(width, height)
    return (
        _clipped((box[0] * side - left) / width),
        _clipped((box[1] * side - top) / height),
        _clipped((box[2] * side - left) / width),
        _clipped((box[3] * side - top) / height),
    )


def to_padded(box: Box, width: int, height: int) -> Box:
    """Map a box from the image to the padded square."""
    side, left, top = _padding(width, height)
    return (
        (box[0] * width + left) / side,
        (box[1] * height + top) / side,
        (box[2] * width + left) / side,
        (box[3] * height + top) / side,
    )


def iou(one: Box, other: Box) -> float:
    """Return intersection over union; 0 where both are empty."""
    across = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    down = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    shared = across * down
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0.0 else 0.0


def _padding(width: int, height: int) -> tuple[int, int, int]:
    """Return the side of the square, and where in it the image begins."""
    side = max(width, height)
    # LLaVA halves to whole pixels: an odd remainder goes to the right and to the bottom.
    return side, int((side - width) / 2), int((side - height) / 2)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _clipped(value: float) -> float:
    return min(1.0, max(0.0, value))
