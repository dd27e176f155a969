"""From scenes to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuea_mllm.errors import DataError
from kuea_mllm.miniworld.scans import SCAN_SIDE, load_scans
from kuea_mllm.miniworld.scenes import CANVAS, CELL, TEXTURES, Scene

Images = NDArray[np.uint8]
_Floats = NDArray[np.float32]

_PALETTE = np.array(
    [
        [0.95, 0.15, 0.15],  # red
        [0.15, 0.85, 0.20],  # green
        [0.20, 0.35, 1.00],  # blue
        [0.95, 0.90, 0.15],  # yellow
        [0.80, 0.20, 0.90],  # purple
        [0.95, 0.95, 0.95],  # white
    ],
    dtype=np.float32,
)
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_WINDOW = 14  # holds the largest digit (10 px) with rotation and jitter
_MARGIN = (_WINDOW - CELL) // 2
_CHUNK = 2000  # bounds the memory of the float images


@dataclass(frozen=True)
class Style:
    """How the same content is drawn; the styles other than "natural" are never trained on.

    Attributes:
        name: The style's name.
        sides: Overrides the size of every digit, in pixels.
        shift: Moves each digit off its cell by up to this many pixels in each direction.
    """

    name: str
    sides: tuple[float, float] | None = None
    shift: int = 0


STYLES = {
    style.name: style
    for style in (
        Style("natural"),
        Style("tiny", sides=(5.5, 6.5)),
        Style("large", sides=(10.5, 12.0)),
        Style("shift", shift=2),
        Style("sketch"),
        Style("gray"),
        Style("invert"),
        Style("noisy"),
        Style("blur"),
    )
}


def render(scene: Scene, rng: np.random.Generator, style: str = "natural") -> Images:
    """Draw one scene as uint8 (32, 32, 3); `rng` decides hues, jitter and noise."""
    picture: Images = render_scenes([scene], rng, style)[0]
    return picture


def render_scenes(
    scenes: Sequence[Scene], rng: np.random.Generator, style: str = "natural"
) -> Images:
    """Draw many scenes at once.

    Args:
        scenes: Scenes, all of one split.
        rng: Decides hues, jitter and noise.
        style: A key of `STYLES`.

    Returns:
        RGB images, uint8, (n, 32, 32, 3).

    Raises:
        DataError: If the style does not exist or the scenes are of several splits.
    """
    if style not in STYLES:
        raise DataError(f"style {style!r} does not exist; choose from {', '.join(STYLES)}.")
    if len({scene.split for scene in scenes}) > 1:
        raise DataError("scenes of several splits cannot be drawn in one call.")
    chunks = [
        _render_chunk(scenes[start : start + _CHUNK], rng, STYLES[style])
        for start in range(0, len(scenes), _CHUNK)
    ]
    return np.concatenate(chunks) if chunks else np.zeros((0, CANVAS, CANVAS, 3), np.uint8)


def _render_chunk(scenes: Sequence[Scene], rng: np.random.Generator, style: Style) -> Images:
    canvas = _backgrounds(np.array([scene.texture for scene in scenes]), rng)
    _draw_objects(canvas, scenes, rng, style)
    canvas *= rng.uniform(0.8, 1.2, (len(scenes), 1, 1, 1)).astype(np.float32)
    canvas = _apply_style(canvas, style.name, rng)
    canvas += 0.04 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _backgrounds(textures: NDArray[np.int64], rng: np.random.Generator) -> _Floats:
    count = len(textures)
    first = rng.uniform(0.0, 0.22, (count, 1, 1, 3)).astype(np.float32)
    second = first + rng.uniform(0.10, 0.25, (count, 1, 1, 3)).astype(np.float32)
    y, x = np.mgrid[0:CANVAS, 0:CANVAS]
    phase = rng.integers(0, 4, (count, 2))
    across = x[None] + phase[:, :1, None]
    down = y[None] + phase[:, 1:, None]
    is_vertical = rng.random((count, 1, 1)) < 0.5
    clouds = rng.random((count, 5, 5), dtype=np.float32)
    share = np.zeros((count, CANVAS, CANVAS), np.float32)  # of the second hue, per pixel
    patterns = {
        "striped": np.where(is_vertical, across, down) // 2 % 2,
        "checked": (across // 4 + down // 4) % 2,
        "dotted": (across % 4 < 2) & (down % 4 < 2),
        "cloudy": _smooth(clouds),
    }
    for name, pattern in patterns.items():
        chosen = textures == TEXTURES.index(name)
        share[chosen] = pattern[chosen]
    return first + share[..., None] * (second - first)


def _smooth(knots: _Floats) -> _Floats:
    """Interpolate (n, 5, 5) knots to the canvas, bilinearly."""
    place = np.linspace(0, knots.shape[1] - 1, CANVAS)
    low = np.minimum(place.astype(int), knots.shape[1] - 2)
    weight = (place - low).astype(np.float32)
    rows = knots[:, low] * (1 - weight)[:, None] + knots[:, low + 1] * weight[:, None]
    blended: _Floats = rows[:, :, low] * (1 - weight) + rows[:, :, low + 1] * weight
    return blended


def _draw_objects(
    canvas: _Floats, scenes: Sequence[Scene], rng: np.random.Generator, style: Style
) -> None:
    pairs = [(index, item) for index, scene in enumerate(scenes) for item in scene.objects]
    count = len(pairs)
    image = np.array([index for index, _ in pairs])
    corner = CELL * np.array([(item.row, item.column) for _, item in pairs])  # (objects, 2)
    corner = corner + rng.integers(-style.shift, style.shift + 1, (count, 2))
    side = np.array([item.side for _, item in pairs], np.float32)
    if style.sides is not None:
        side = rng.uniform(*style.sides, count).astype(np.float32)
    scans = load_scans(scenes[0].split).pixels[[item.scan for _, item in pairs]]
    ink = _transformed(scans, side, rng)  # (objects, window, window)
    colour = _PALETTE[[item.colour for _, item in pairs]]
    colour = colour + rng.uniform(-0.06, 0.06, colour.shape).astype(np.float32)
    window = np.arange(_WINDOW) - _MARGIN
    ys = corner[:, :1] + window
    xs = corner[:, 1:] + window
    inside = ((ys >= 0) & (ys < CANVAS))[:, :, None] & ((xs >= 0) & (xs < CANVAS))[:, None, :]
    ink = np.where(inside, ink, 0)[..., None]
    ys, xs = np.clip(ys, 0, CANVAS - 1), np.clip(xs, 0, CANVAS - 1)
    # Pixels outside the canvas are clamped onto its border with no ink, where they would
    # overwrite the ink of the same window: adding a difference keeps both.
    where = (image[:, None, None], ys[:, :, None], xs[:, None, :])
    rank = np.concatenate([np.arange(len(scene.objects)) for scene in scenes])
    for layer in range(int(rank.max()) + 1):
        chosen = rank == layer
        place = (where[0][chosen], where[1][chosen], where[2][chosen])
        change = ink[chosen] * (colour[chosen][:, None, None] - canvas[place])
        np.add.at(canvas, place, change)


def _transformed(scans: _Floats, side: _Floats, rng: np.random.Generator) -> _Floats:
    """Resize, rotate, shear and move scans; returns ink, (objects, window, window)."""
    count = len(scans)
    angle = rng.uniform(-0.15, 0.15, (count, 1, 1)).astype(np.float32)
    shear = rng.uniform(-0.1, 0.1, (count, 1, 1)).astype(np.float32)
    jitter = rng.uniform(-1, 1, (2, count, 1, 1)).astype(np.float32)
    grid = np.arange(_WINDOW, dtype=np.float32) + 0.5 - _WINDOW / 2
    down = grid[None, :, None] - jitter[0]
    across = grid[None, None, :] - jitter[1]
    cosine, sine = np.cos(angle), np.sin(angle)
    scale = (SCAN_SIDE / side)[:, None, None]
    u = scale * (cosine * across + sine * down + shear * down) + SCAN_SIDE / 2 + 0.5
    v = scale * (cosine * down - sine * across) + SCAN_SIDE / 2 + 0.5
    padded = np.pad(scans, ((0, 0), (1, 1), (1, 1)))  # sampling outside a scan finds no ink
    u = np.clip(u, 0, SCAN_SIDE + 0.999)
    v = np.clip(v, 0, SCAN_SIDE + 0.999)
    left, top = u.astype(np.int64), v.astype(np.int64)
    du, dv = u - left, v - top
    item = np.arange(count)[:, None, None]
    ink = (
        padded[item, top, left] * (1 - du) * (1 - dv)
        + padded[item, top, left + 1] * du * (1 - dv)
        + padded[item, top + 1, left] * (1 - du) * dv
        + padded[item, top + 1, left + 1] * du * dv
    )
    clipped: _Floats = np.clip(1.15 * ink, 0, 1)
    return clipped


def _apply_style(canvas: _Floats, name: str, rng: np.random.Generator) -> _Floats:
    if name == "gray":
        return _in_three_channels(canvas @ _LUMINANCE)
    if name == "sketch":
        gray = np.pad(canvas @ _LUMINANCE, ((0, 0), (0, 1), (0, 1)), mode="edge")
        edges = np.abs(np.diff(gray, axis=1))[:, :, :-1] + np.abs(np.diff(gray, axis=2))[:, :-1]
        return _in_three_channels(np.clip(edges, 0, 1))
    if name == "invert":
        return 1 - canvas
    if name == "noisy":
        return canvas + 0.15 * rng.standard_normal(canvas.shape, dtype=np.float32)
    if name == "blur":
        wide = np.pad(canvas, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        rows = (wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]) / 3
        blurred = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 3
        return blurred.astype(np.float32)
    return canvas


def _in_three_channels(gray: _Floats) -> _Floats:
    return np.repeat(gray[..., None], 3, axis=3)
