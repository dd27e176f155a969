"""Labels of patches, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coco_samples import write_pair
from numpy.typing import NDArray
from PIL import Image

from kuea_mllm.errors import DataError, UnreadableImage
from kuea_mllm.probing.patch_labels import (
    COCO_STUFF_CLASSES,
    LabelledPictures,
    class_numbers,
    open_coco_stuff,
    patch_classes,
    picture_classes,
)

# Classes of a 4 x 4 picture; 0 is "unlabeled".
SQUARE = np.array(
    [
        [1, 1, 0, 0],
        [1, 2, 0, 0],
        [0, 3, 3, 3],
        [3, 3, 3, 3],
    ],
    dtype=np.uint8,
)


def classes_of(flags: NDArray[np.bool_]) -> list[int]:
    return list(np.flatnonzero(flags).tolist())


def grey(side: int = 4) -> NDArray[np.uint8]:
    return np.full((side, side, 3), 90, dtype=np.uint8)


def open_one(
    folder: Path, pixels: NDArray[np.uint8], stored: NDArray[np.uint8]
) -> LabelledPictures:
    write_pair(folder, "val", "000000000007", pixels, stored)
    return open_coco_stuff(folder, "val")


def test_there_are_183_classes() -> None:
    assert len(COCO_STUFF_CLASSES) == len(set(COCO_STUFF_CLASSES)) == 183
    assert COCO_STUFF_CLASSES[0] == "unlabeled"
    # The last thing and the first stuff.
    assert COCO_STUFF_CLASSES[91:93] == ("hair brush", "banner")
    assert COCO_STUFF_CLASSES[155] == "sea"


def test_stored_values_are_one_less_than_classes() -> None:
    stored = np.array([[255, 0], [90, 181]], dtype=np.uint8)
    assert class_numbers(stored, "map").tolist() == [[0, 1], [91, 182]]


@pytest.mark.parametrize("value", [182, 254])
def test_value_that_is_no_class_is_refused(value: int) -> None:
    with pytest.raises(DataError, match=rf"map\.png holds the value {value}"):
        class_numbers(np.array([[0, value]], dtype=np.uint8), "map.png")


def test_patch_holds_the_classes_of_its_pixels() -> None:
    flags = patch_classes(SQUARE, 2)
    # Left above: 1 and 2; right above: nothing but unlabeled; left below: 3, unlabeled dropped.
    assert [classes_of(row) for row in flags] == [[1, 2], [0], [3], [3]]
    assert flags.shape == (4, 183)


def test_labels_of_many_maps_equal_sets_of_their_pixels() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        classes = generator.choice([0, 0, 0, 1, 77, 182], (12, 12)).astype(np.uint8)
        flags = patch_classes(classes, 2)
        for row in range(6):
            for column in range(6):
                seen = set(classes[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel())
                expected = {0} if seen == {0} else seen - {0}
                assert set(classes_of(flags[6 * row + column])) == expected
        assert set(classes_of(picture_classes(classes, 2))) == set(classes.ravel())


def test_picture_keeps_unlabeled_among_others() -> None:
    assert classes_of(picture_classes(SQUARE, 2)) == [0, 1, 2, 3]


def test_pixels_beyond_the_last_whole_patch_count_nowhere() -> None:
    assert [classes_of(row) for row in patch_classes(SQUARE, 3)] == [[1, 2, 3]]
    only_outside = np.ones((3, 3), dtype=np.uint8)
    only_outside[2, 2] = 9
    assert classes_of(picture_classes(only_outside, 2)) == [1]


def test_largest_centred_square_is_cut_from_both(tmp_path: Path) -> None:
    """Columns 1 and 2 of five: of three columns too many, two go at the right."""
    stored = np.array([[10, 20, 30, 40, 50], [10, 20, 30, 40, 50]], dtype=np.uint8)
    pixels = np.repeat(stored[..., None], 3, axis=2)
    seen, classes = open_one(tmp_path, pixels, stored).read(0, 2)
    assert classes.tolist() == [[21, 31], [21, 31]]
    assert seen[0].tolist() == [[20, 30], [20, 30]]


def test_label_maps_are_resized_without_mixing(tmp_path: Path) -> None:
    stored = np.where(np.arange(64).reshape(8, 8) % 8 < 4, 0, 180).astype(np.uint8)
    for side in (3, 5, 16):
        _, classes = open_one(tmp_path, grey(8), stored).read(0, side)
        assert classes.shape == (side, side)
        assert set(np.unique(classes).tolist()) == {1, 181}


def test_both_layouts_are_found(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", "1", grey(), SQUARE)
    (tmp_path / "images" / "train2017").rename(tmp_path / "train2017")
    (tmp_path / "stuffthingmaps").mkdir()
    (tmp_path / "annotations" / "train2017").rename(tmp_path / "stuffthingmaps" / "train2017")
    assert len(open_coco_stuff(tmp_path, "train")) == 1


@pytest.mark.parametrize("folder", ["train2017", "train"])
@pytest.mark.parametrize("split", ["train2017", "train"])
def test_split_may_be_called_with_its_year(tmp_path: Path, split: str, folder: str) -> None:
    write_pair(tmp_path, "train", "1", grey(), SQUARE)
    for kind in ("images", "annotations"):
        (tmp_path / kind / "train2017").rename(tmp_path / kind / folder)
    assert len(open_coco_stuff(tmp_path, split)) == 1


def test_missing_label_map_is_named(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_pair(tmp_path, "val", name, grey(), SQUARE)
    (tmp_path / "annotations" / "val2017" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png has no label map .*2\.png \(1 of 2 are missing\)"):
        open_coco_stuff(tmp_path, "val")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "val", "1", grey(), SQUARE)
    places = "images/train2017 nor train2017 nor images/train nor train is there"
    for split in ("train", "train2017"):
        with pytest.raises(DataError, match=f"no pictures of split {split}: neither {places}"):
            open_coco_stuff(tmp_path, split)


def test_map_with_a_wrong_class_names_its_file(tmp_path: Path) -> None:
    pictures = open_one(tmp_path, grey(), np.full((4, 4), 200, dtype=np.uint8))
    with pytest.raises(DataError, match=r"000000000007\.png holds the value 200"):
        pictures.read(0, 4)


def test_map_of_another_picture_is_refused(tmp_path: Path) -> None:
    pictures = open_one(tmp_path, grey(), np.zeros((4, 5), dtype=np.uint8))
    with pytest.raises(DataError, match="has 5 x 4 pixels, its picture 4 x 4"):
        pictures.read(0, 4)


def test_coloured_map_is_refused(tmp_path: Path) -> None:
    pictures = open_one(tmp_path, grey(), np.zeros((4, 4), dtype=np.uint8))
    Image.fromarray(grey()).save(pictures.label_file(0))
    with pytest.raises(DataError, match="mode RGB, not one number per pixel"):
        pictures.read(0, 4)


def test_map_that_is_cut_short_is_named(tmp_path: Path) -> None:
    pictures = open_one(tmp_path, grey(), np.zeros((4, 4), dtype=np.uint8))
    path = pictures.label_file(0)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UnreadableImage, match=r"annotations/val2017/000000000007\.png"):
        pictures.read(0, 4)


def test_limit_takes_pictures_with_their_own_maps(tmp_path: Path) -> None:
    for number in range(5):
        stored = np.full((4, 4), number, dtype=np.uint8)
        write_pair(tmp_path, "val", str(number), grey(), stored)
    some = open_coco_stuff(tmp_path, "val").limited(3)
    assert [int(some.read(index, 2)[1][0, 0]) for index in range(len(some))] == [1, 3, 5]
    assert some.fingerprint() != open_coco_stuff(tmp_path, "val").fingerprint()


def test_fingerprint_changes_with_a_label_map(tmp_path: Path) -> None:
    pictures = open_one(tmp_path, grey(), SQUARE)
    before = pictures.fingerprint()
    path = pictures.label_file(0)
    path.write_bytes(path.read_bytes() + b"more")
    assert pictures.fingerprint() != before
