from __future__ import annotations

import errno
import io
import os
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
        ({"doc_id": 1, "image": "gone/x.jpg"}, f"file gone/x.jpg is not in {Path.cwd()}"),
    ],
)
def test_missing_picture_says_why(row: dict[str, object], reason: str, tmp_path: Path) -> None:
    assert PictureShelf([tmp_path]).load("pope", row) == (None, reason)


def noise_jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


DAMAGED = "is cut short or damaged"
UNKNOWN = "is not a picture (BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP)"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"<svg onload=x>", UNKNOWN),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", UNKNOWN),
        (b"\xff\xd8\xff\xe0", DAMAGED),
        (make_png(30)[:40], DAMAGED),
        (make_png(30)[:50], DAMAGED),
        (noise_jpeg()[:900], DAMAGED),
    ],
)
def test_file_that_is_no_picture_says_what_is_wrong(
    content: bytes, fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    found = PictureShelf([tmp_path]).load("pope", {"doc_id": 1, "image": str(path)})
    assert found == (None, f"file {path} {fault}")


def test_folder_and_pipe_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    shelf = PictureShelf([tmp_path])
    for path in (tmp_path, tmp_path / "pipe"):
        found = shelf.load("pope", {"doc_id": 1, "image": str(path)})
        assert found == (None, f"file {path} is not a file")


def test_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_photo(tmp_path / "photo.jpg")

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    # The rights of files do not bind the tests where they run as root.
    monkeypatch.setattr(Path, "open", refuse)
    found = PictureShelf([tmp_path]).load("pope", {"doc_id": 1, "image": str(path)})
    assert found == (None, f"file {path} may not be read by this user")


def test_damaged_stored_picture_gives_way_to_the_original_or_says_why(tmp_path: Path) -> None:
    write_thumbnails(tmp_path, "pope", [(3, "a.png", make_png(8)[:40])])
    photo = write_photo(tmp_path / "photo.jpg")
    shelf = PictureShelf([tmp_path])
    assert shelf.load("pope", {"doc_id": 3}) == (None, f"picture a.png {DAMAGED}")
    assert shelf.load("pope", {"doc_id": 3, "image": str(photo)})[0]


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
    faults = (
        UNKNOWN,
        "is too large: more than 0.0005 million pixels",
        "is too large: more than 0.02 MB",
    )
    for path, fault in zip(paths, faults, strict=True):
        found = shelf.load("pope", {"doc_id": path.name, "image": str(path)})
        assert found == (None, f"file {path} {fault}")


def test_picture_that_would_fill_the_memory_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_photo(tmp_path / "photo.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    found = PictureShelf([tmp_path]).load("pope", {"doc_id": 1, "image": str(path)})
    assert found == (None, f"file {path} is too large: more than 64 million pixels")


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
