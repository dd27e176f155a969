from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reporting_samples import make_png
from suite_samples import write_thumbnails

from kuea_mllm.reporting import pictures
from kuea_mllm.reporting.pictures import LIMIT_BYTES, MAX_SIDE, PictureShelf


def write_photo(path: Path, size: tuple[int, int] = (640, 480)) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    return path


def test_stored_picture_comes_before_the_original(tmp_path: Path) -> None:
    write_thumbnails(tmp_path, "pope", [(3, "a.png", make_png(8))])
    photo = write_photo(tmp_path / "photo.jpg")
    shelf = PictureShelf([tmp_path])
    assert shelf.load("pope", {"doc_id": 3, "image": str(photo)}) == (make_png(8), "")


def test_original_is_made_small(tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "photo.jpg")
    content, missing = PictureShelf([tmp_path]).load("pope", {"doc_id": 3, "image": str(photo)})
    assert content is not None and missing == ""
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (MAX_SIDE, MAX_SIDE * 3 // 4)
    assert photo.stat().st_size > 4 * LIMIT_BYTES > len(content)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"doc_id": 1}, "no picture stored"),
        ({"doc_id": 1, "image": "/gone/x.jpg"}, "file /gone/x.jpg is not on this machine"),
    ],
)
def test_missing_picture_says_why(row: dict[str, object], reason: str, tmp_path: Path) -> None:
    assert PictureShelf([tmp_path]).load("pope", row) == (None, reason)


@pytest.mark.parametrize(
    "content", [b"", b"<svg onload=x>", b"\xff\xd8\xff\xe0", make_png(30)[:40]]
)
def test_unreadable_file_is_no_picture(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    found = PictureShelf([tmp_path]).load("pope", {"doc_id": 1, "image": str(path)})
    assert found == (None, f"file {path} is not readable")


def test_index_names_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(make_png(8))
    write_thumbnails(tmp_path, "pope", [])
    (tmp_path / "thumbnails" / "pope.jsonl").write_text(
        '{"doc_id": 1, "picture": "../../secret.png"}\n{"doc_id": 2, "pict'
    )
    assert not PictureShelf([tmp_path]).has("pope", {"doc_id": 1})


def test_original_gives_pixels_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(make_png(20) + b"what else the file holds")
    content, _ = PictureShelf([tmp_path]).load("pope", {"doc_id": 1, "image": str(path)})
    assert content is not None and b"what else" not in content
    with Image.open(io.BytesIO(content)) as found, Image.open(path) as original:
        assert found.format == "PNG" and found.tobytes() == original.convert("RGB").tobytes()


def test_only_common_formats_of_bounded_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "x.eps", tmp_path / "wide.png", tmp_path / "big.bmp"]
    # Decoding EPS runs Ghostscript.
    for path, size in zip(paths, ((9, 9), (100, 9), (9, 9)), strict=True):
        Image.new("RGB", size).save(path)
    with paths[2].open("ab") as file:
        file.truncate(30_000)
    monkeypatch.setattr(pictures, "LARGEST_FILE", 20_000)
    monkeypatch.setattr(pictures, "LARGEST_PICTURE", 500)
    shelf = PictureShelf([tmp_path])
    for number, path in enumerate(paths):
        found = shelf.load("pope", {"doc_id": number, "image": str(path)})
        assert found == (None, f"file {path} is not readable")


@pytest.mark.parametrize("image", ["/" + "a" * 5000, "a\0b", ["a.png"], 5])
def test_name_that_is_no_path_is_no_picture(image: object, tmp_path: Path) -> None:
    content, reason = PictureShelf([tmp_path]).load("pope", {"doc_id": 1, "image": image})
    assert content is None and reason


def test_stored_picture_is_no_link_to_elsewhere(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    write_thumbnails(results, "pope", [(1, "a.png", make_png(8))])
    picture = results / "thumbnails" / "pictures" / "a.png"
    picture.rename(tmp_path / "private.png")
    picture.symlink_to(tmp_path / "private.png")
    assert not PictureShelf([results]).has("pope", {"doc_id": 1})


def test_damaged_lines_of_the_index_cost_their_pictures_only(tmp_path: Path) -> None:
    write_thumbnails(tmp_path, "pope", [(3, "a.png", make_png(8))])
    index = tmp_path / "thumbnails" / "pope.jsonl"
    index.write_bytes(b'{"picture": "a.png"}\n[1]\n\xff\n' + index.read_bytes())
    assert PictureShelf([tmp_path]).load("pope", {"doc_id": 3}) == (make_png(8), "")
