"""Every kind of fault is found and named; what is written afterwards can be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mixture_samples import record, turns, write_image, write_lines, write_list

from kuea_mllm.errors import DataError, OutputError
from kuea_mllm.tuning.check import MixtureReport, check_mixture, write_clean
from kuea_mllm.tuning.mixture import open_mixture
from kuea_mllm.tuning.scanning import scan_records

CHAT = {
    "id": "chat",
    "messages": [
        {"role": "user", "content": [{"type": "image", "path": "b.jpg"}]},
        {"role": "assistant", "content": "b.jpg"},
    ],
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    write_image(folder / "a.png")
    write_image(folder / "deep" / "photo.jpg", size=(30, 20))
    write_image(folder / "misnamed.jpg", format="GIF")
    write_image(folder / "b.gif")
    (folder / "empty.jpg").touch()
    whole = (folder / "deep" / "photo.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "folder.png").mkdir()
    return folder


RECORDS: list[tuple[Any, str | None]] = [
    (record(0), None),
    (record(1, image="deep/photo.jpg"), None),
    (record(2, image="misnamed.jpg"), "misnamed image file"),
    (record(3, image="gone.jpg"), "missing image"),
    (record(4, image="empty.jpg"), "empty image file"),
    (record(5, image="cut.jpg"), "corrupt image"),
    (record(6, image="text.png"), "corrupt image"),
    (record(7, image="folder.png"), "missing image"),
    (record(8, image="../a.png"), "path leaves the folder"),
    (record(9, image="b.jpg"), "image under another name"),
    (record(10, image=None), None),
    (record(11, image=None, conversations=turns("What?", "")), "nothing to learn"),
    (record(12, conversations=turns("no tag", "b")), "image tags do not match"),
    ("text", "no object"),
    (record(14, image="gone.jpg"), "missing image"),
    (CHAT, "image under another name"),
]


def checked(tmp_path: Path, images: Path | None, write: Any = write_list) -> MixtureReport:
    path = write(tmp_path / "mix.json", [each for each, _ in RECORDS])
    return check_mixture(path, images, progress=False)


def test_every_fault_is_found_with_its_record(tmp_path: Path, images: Path) -> None:
    report = checked(tmp_path, images)
    found = {each.index: each for each in report.findings}
    expected = {index: kind for index, (_, kind) in enumerate(RECORDS) if kind is not None}
    assert {index: each.kind for index, each in found.items()} == expected
    assert (report.records, report.text_only, report.different_images) == (16, 1, 9)
    assert (found[3].id, found[3].image) == ("r3", "gone.jpg")
    assert str(images / "gone.jpg") in found[3].detail
    assert "is a GIF file" in found[2].detail
    assert found[2].action == "keep"
    assert found[9].corrected == "b.gif"
    assert report.counts()["missing image", "leave out"] == 3
    assert len(report.problems) == len(expected) - 1
    json.dumps(report.to_dict())


def test_without_a_folder_images_are_left_alone(tmp_path: Path) -> None:
    kinds = {each.kind for each in checked(tmp_path, None).findings}
    assert kinds == {
        "path leaves the folder",
        "nothing to learn",
        "image tags do not match",
        "no object",
    }


@pytest.mark.parametrize(("write", "name"), [(write_list, "clean.json"), (write_lines, "c.jsonl")])
def test_cleaned_file_has_nothing_left_to_find(
    write: Any, name: str, tmp_path: Path, images: Path
) -> None:
    out = tmp_path / "new" / name
    clean = write_clean(checked(tmp_path, images, write), out)
    assert clean == (out, 6, 10, 2)
    left = list(scan_records(out))
    assert left[:3] == [RECORDS[index][0] for index in (0, 1, 2)]
    assert left[3] == {**RECORDS[9][0], "image": "b.gif"}
    assert left[5]["messages"][0]["content"][0]["path"] == "b.gif"
    # An answer that happens to read like the path stays.
    assert left[5]["messages"][1]["content"] == "b.jpg"
    assert check_mixture(out, images, progress=False).problems == []
    assert len(open_mixture(out, cache=tmp_path / "cache", progress=False)) == 6
    assert (out.read_text()[0] == "[") is (name == "clean.json")
    assert [path.name for path in out.parent.iterdir()] == [name]


def test_existing_file_is_never_overwritten(tmp_path: Path, images: Path) -> None:
    report = checked(tmp_path, images)
    before = report.data.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write_clean(report, report.data)
    assert report.data.read_bytes() == before


def test_cleaning_everything_away_is_refused(tmp_path: Path, images: Path) -> None:
    path = write_list(tmp_path / "mix.json", [record(0, image="elsewhere/a.png")])
    report = check_mixture(path, images, progress=False)
    with pytest.raises(DataError, match="no record would be left") as caught:
        write_clean(report, tmp_path / "clean.json")
    assert "--images" in caught.value.remedy
    assert not (tmp_path / "clean.json").exists()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    path = write_list(tmp_path / "mix.json", [record(0)])
    with pytest.raises(DataError, match=r"image folder .*nowhere does not exist"):
        check_mixture(path, tmp_path / "nowhere", progress=False)
