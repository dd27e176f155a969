"""What an image of the mini world contains, before any pixel is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from kuea_mllm.miniworld.scans import load_scans

GRID = 4
CELL = 8
CANVAS = GRID * CELL
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
TEXTURES = ("plain", "striped", "checked", "dotted", "cloudy")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
MAX_OBJECTS = 4
SIDES = (7.0, 10.0)
_DRAWS = len(DIGITS) + len(COLOURS) + GRID * GRID + 2 * MAX_OBJECTS + 1


@dataclass(frozen=True)
class SceneObject:
    """One digit on the canvas.

    Attributes:
        digit: Class, 0 to 9.
        colour: Index into `COLOURS`.
        row: Grid row, 0 (top) to 3.
        column: Grid column, 0 (left) to 3.
        side: Size of the drawn scan in pixels.
        scan: Row of the scan within its split.
    """

    digit: int
    colour: int
    row: int
    column: int
    side: float
    scan: int

    @property
    def digit_name(self) -> str:
        """The digit as a word."""
        return DIGITS[self.digit]

    @property
    def colour_name(self) -> str:
        """The colour as a word."""
        return COLOURS[self.colour]

    @property
    def quarter_name(self) -> str:
        """The quarter of the canvas that holds the cell, such as "top left"."""
        return QUARTERS[2 * (self.row // 2) + self.column // 2]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The cell as (left, top, right, bottom), in fractions of the canvas.

        The cell and not the ink: one cell is one patch of the vision towers, so a model can name
        the box exactly, and a neighbouring cell has IoU 0.
        """
        return (
            self.column / GRID,
            self.row / GRID,
            (self.column + 1) / GRID,
            (self.row + 1) / GRID,
        )


@dataclass(frozen=True)
class Scene:
    """The content of one image: everything a caption, a question or a label may refer to.

    Attributes:
        split: Split whose scans the objects are drawn with.
        objects: 1 to 4 objects with distinct digits, colours and cells.
        texture: Index into `TEXTURES`.
    """

    split: str
    objects: tuple[SceneObject, ...]
    texture: int

    @property
    def texture_name(self) -> str:
        """The background as a word."""
        return TEXTURES[self.texture]

    @property
    def digits(self) -> frozenset[int]:
        """The digit classes in the scene."""
        return frozenset(item.digit for item in self.objects)


def sample_scene(
    rng: np.random.Generator,
    split: str,
    *,
    objects: tuple[int, int] = (1, MAX_OBJECTS),
    sides: tuple[float, float] = SIDES,
) -> Scene:
    """Draw one scene.

    Args:
        rng: Source of every choice.
        split: Split of the scans: "train", "validation" or "test".
        objects: Least and greatest number of objects, drawn uniformly.
        sides: Least and greatest size of a digit in pixels, drawn uniformly.
    """
    count = int(rng.integers(objects[0], objects[1] + 1))
    # One draw for everything: a generator call costs more than the rest of this function.
    draws = rng.random(_DRAWS).tolist()
    digits = _first_of_shuffled(draws[:10], count)
    colours = _first_of_shuffled(draws[10:16], count)
    cells = _first_of_shuffled(draws[16:32], count)
    rows = _scan_rows(split)
    placed = tuple(
        SceneObject(
            digit=digit,
            colour=colour,
            row=cell // GRID,
            column=cell % GRID,
            side=sides[0] + draws[32 + index] * (sides[1] - sides[0]),
            scan=rows[digit][int(draws[36 + index] * len(rows[digit]))],
        )
        for index, (digit, colour, cell) in enumerate(zip(digits, colours, cells, strict=True))
    )
    return Scene(split=split, objects=placed, texture=int(draws[-1] * len(TEXTURES)))


def sample_scenes(
    count: int,
    split: str,
    *,
    seed: int,
    objects: tuple[int, int] = (1, MAX_OBJECTS),
    sides: tuple[float, float] = SIDES,
) -> list[Scene]:
    """Draw `count` scenes from a seed; a longer list begins with the shorter one."""
    rng = np.random.default_rng([seed, 1])
    return [sample_scene(rng, split, objects=objects, sides=sides) for _ in range(count)]


def _first_of_shuffled(keys: list[float], count: int) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__)[:count]


@cache
def _scan_rows(split: str) -> tuple[list[int], ...]:
    scans = load_scans(split)
    return tuple(scans.of_digit(digit).tolist() for digit in range(len(DIGITS)))
