"""Pictures on disk: an ImageNet-like folder, and a sheet of examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kuea_mllm.io import atomic_directory
from kuea_mllm.miniworld.captions import caption_scene
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import CANVAS, sample_scenes

if TYPE_CHECKING:
    from PIL.Image import Image

_PER_FOLDER = 1000


def write_images(folder: Path, *, split: str, count: int, seed: int) -> None:
    """Write pictures as PNG files: `folder/00/000001.png`, a thousand in each subfolder.

    Args:
        folder: Folder to create; must not exist.
        split: Split of the scans: "train", "validation" or "test".
        count: Number of pictures.
        seed: Decides the pictures.

    Raises:
        OutputError: If `folder` exists or cannot be created.
        DataError: If there is no such split.
    """
    from PIL import Image

    scenes = sample_scenes(count, split, seed=seed)
    pictures = render_scenes(scenes, np.random.default_rng([seed, 4]))
    with atomic_directory(folder) as partial:
        for index, picture in enumerate(pictures):
            subfolder = partial / f"{index // _PER_FOLDER:02d}"
            subfolder.mkdir(exist_ok=True)
            Image.fromarray(picture).save(subfolder / f"{index + 1:06d}.png")


def contact_sheet(
    *, split: str = "train", rows: int = 4, columns: int = 6, seed: int = 0, scale: int = 5
) -> Image:
    """Draw example pictures with their captions below them.

    Args:
        split: Split of the scans.
        rows: Rows of pictures.
        columns: Columns of pictures.
        seed: Decides the pictures.
        scale: Screen pixels for each pixel of a picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng([seed, 5])
    scenes = sample_scenes(rows * columns, split, seed=seed)
    pictures = render_scenes(scenes, rng)
    side, gap = CANVAS * scale, 10
    font = ImageFont.load_default(size=11)
    line_height = 14
    width, height = side + gap, side + 3 * line_height + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        left = gap + index % columns * width
        top = gap + index // columns * height
        large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(large, (left, top))
        lines = _wrap(caption_scene(scene, rng), side // 6)
        draw.multiline_text((left, top + side + 2), "\n".join(lines[:3]), fill="black", font=font)
    return sheet


def _wrap(text: str, letters: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, letters)
