from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kuea_mllm.evaluation.thumbnails import MAX_SIDE, thumbnail_writer


def make_image(seed: int, size: tuple[int, int] = (640, 480), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def read_index(folder: Path, task: str) -> dict[int, str]:
    lines = (folder / f"{task}.jsonl").read_text().splitlines()
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {entry["doc_id"]: entry["picture"] for entry in entries}


def test_equal_images_are_one_file(tmp_path: Path) -> None:
    keep = thumbnail_writer(tmp_path, 9)
    for doc_id in range(6):
        keep("pope", doc_id, [make_image(doc_id // 3)])
    index = read_index(tmp_path, "pope")
    assert index[0] == index[1] == index[2] != index[3] == index[5]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == set(index.values())


def test_photographs_become_small(tmp_path: Path) -> None:
    thumbnail_writer(tmp_path, 1)("pope", 0, [make_image(0)])
    (path,) = (tmp_path / "pictures").iterdir()
    with Image.open(path) as image:
        assert image.format == "JPEG" and max(image.size) == MAX_SIDE


def test_tiny_images_keep_every_pixel(tmp_path: Path) -> None:
    tiny = make_image(0, (24, 24))
    thumbnail_writer(tmp_path, 1)("mini/world", 0, [tiny])
    name = read_index(tmp_path, "mini_world")[0]
    with Image.open(tmp_path / "pictures" / name) as image:
        assert image.tobytes() == tiny.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA"])
def test_images_of_every_mode_are_kept(mode: str, tmp_path: Path) -> None:
    keep = thumbnail_writer(tmp_path, 2)
    keep("a", 0, [make_image(0, mode=mode)])
    keep("a", 1, [make_image(0, (32, 32), mode=mode)])
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_later_documents_and_questions_without_images_are_not_kept(tmp_path: Path) -> None:
    keep = thumbnail_writer(tmp_path, 1)
    keep("a", 1, [make_image(0)])
    keep("a", 0, [])
    assert list(tmp_path.iterdir()) == []
