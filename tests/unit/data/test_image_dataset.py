"""Items, random transforms, unreadable images, and the choice of a part."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from data_samples import encoded, picture, write_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kuea_mllm.data.augment import CROP_RATIO, CROP_SCALE, crop_box, random_stream
from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.folder import FolderImages
from kuea_mllm.data.selection import select_positions
from kuea_mllm.data.source import as_raised_in_worker
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.data.unreadable import SkipPolicy, UnreadableCounter, pack_name, unpack_name
from kuea_mllm.errors import DataError, UnreadableImage

SIDE = 16


@pytest.fixture
def source(tmp_path):
    return FolderImages(write_folder(tmp_path / "images", 6))


@pytest.fixture
def damaged(tmp_path):
    return FolderImages(write_folder(tmp_path / "images", 6, bad=(1, 2, 5)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_float_pixels_are_the_uint8_ones_divided_by_255(mode):
    transform, image = ImageTransform(SIDE), picture(0).convert(mode)
    pixels = transform.to_uint8(image)
    assert pixels.dtype == np.uint8
    assert torch.equal(transform(image), torch.from_numpy(pixels).to(torch.float32) / 255)


def test_item_holds_uint8_pixels_position_and_their_checksum(source):
    item = ImageDataset(source, ImageTransform(SIDE))[3]
    assert set(item) == {"pixels", "index", "checksum"}
    assert item["pixels"].dtype == torch.uint8
    assert item["pixels"].shape == (3, SIDE, SIDE)
    assert item["index"] == 3
    assert item["checksum"] == zlib.crc32(item["pixels"].numpy().tobytes())
    assert torch.equal(item["pixels"] / 255, ImageTransform(SIDE)(picture(3)))


def test_draw_of_a_later_epoch_is_the_same_image(source):
    dataset = ImageDataset(source, ImageTransform(SIDE))
    assert dataset[3 + 5 * len(source)]["checksum"] == dataset[3]["checksum"]
    assert dataset[3 + 5 * len(source)]["index"] == 3
    with pytest.raises(IndexError):
        dataset[-1]


@pytest.mark.parametrize("augment", ["flip", "random_resized_crop"])
def test_random_transform_is_a_pure_function_of_seed_and_draw(source, augment):
    draws = [epoch * len(source) + 2 for epoch in range(12)]

    def checksums(seed, order):
        dataset = ImageDataset(source, ImageTransform(SIDE), augment=augment, seed=seed)
        return {draw: dataset[draw]["checksum"] for draw in order}

    first = checksums(0, draws)
    assert checksums(0, draws[::-1]) == first
    assert checksums(1, draws) != first
    assert len(set(first.values())) == (2 if augment == "flip" else len(draws))


def test_flip_mirrors_the_result_of_the_plain_transform(source):
    plain = ImageDataset(source, ImageTransform(SIDE))[0]["pixels"]
    flipping = ImageDataset(source, ImageTransform(SIDE), augment="flip")
    found = [flipping[epoch * len(source)]["pixels"] for epoch in range(40)]
    mirrored = sum(torch.equal(each, plain.flip(-1)) for each in found)
    assert mirrored + sum(torch.equal(each, plain) for each in found) == 40
    assert 10 <= mirrored <= 30


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_crop_box_lies_inside_and_keeps_its_bounds(width, height, draw):
    left, top, box_width, box_height = crop_box((width, height), random_stream(0, draw))
    assert 0 <= left <= left + box_width <= width
    assert 0 <= top <= top + box_height <= height
    if min(width, height) >= 100 and max(width, height) <= 133:
        # Rounding to whole pixels moves area and aspect a little.
        assert box_width * box_height >= (CROP_SCALE[0] - 0.02) * width * height
        assert CROP_RATIO[0] - 0.02 <= box_width / box_height <= CROP_RATIO[1] + 0.02


@pytest.mark.parametrize("mode", ["P", "1", "RGBA", "CMYK"])
def test_random_crop_takes_every_mode(mode, tmp_path):
    image = picture(0).convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    image.save(tmp_path / f"a.{suffix}")
    dataset = ImageDataset(
        FolderImages(tmp_path), ImageTransform(SIDE), augment="random_resized_crop"
    )
    assert dataset[0]["pixels"].shape == (3, SIDE, SIDE)


# Unreadable images


def test_first_unreadable_image_is_raised_by_default(damaged):
    for skip in (None, SkipPolicy(0)):
        dataset = ImageDataset(damaged, ImageTransform(SIDE), skip=skip)
        with pytest.raises(UnreadableImage, match=r"001.png cannot be read"):
            dataset[1]


def test_unreadable_image_is_replaced_by_the_next_readable_one(damaged):
    dataset = ImageDataset(damaged, ImageTransform(SIDE), skip=SkipPolicy(3))
    plain = ImageDataset(damaged, ImageTransform(SIDE))
    found = [(dataset[p]["replaced"], dataset[p]["index"]) for p in range(6)]
    assert found == [(-1, 0), (1, 3), (2, 3), (-1, 3), (-1, 4), (5, 0)]
    assert dataset[1]["checksum"] == plain[3]["checksum"]


def test_replacement_never_comes_from_outside_the_allowed_positions(damaged):
    skip = SkipPolicy(3, positions=np.array([0, 1, 2, 4, 5]))
    dataset = ImageDataset(damaged, ImageTransform(SIDE), skip=skip)
    assert [dataset[p]["index"] for p in (1, 2, 5)] == [4, 4, 0]


def test_more_unreadable_images_in_a_row_than_allowed_end_at_once(damaged):
    dataset = ImageDataset(damaged, ImageTransform(SIDE), skip=SkipPolicy(1))
    with pytest.raises(UnreadableImage, match=r"2 images cannot be read, 1 are allowed.*002.png"):
        dataset[1]


def test_source_without_a_readable_image_is_an_error_and_no_endless_loop(tmp_path):
    source = FolderImages(write_folder(tmp_path, 3, bad=(0, 1, 2)))
    with pytest.raises(DataError, match="none of the 3 images"):
        ImageDataset(source, ImageTransform(SIDE), skip=SkipPolicy(9))[1]


def test_counter_counts_each_image_once_names_them_and_stops(damaged):
    dataset = ImageDataset(damaged, ImageTransform(SIDE), skip=SkipPolicy(2))
    counter = UnreadableCounter(2, damaged.name)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, sampler=[0, 1, 3, 1, 2])
    for _ in range(3):
        for batch in loader:
            counter.update(batch)
    assert counter.count == 2
    assert [name[-7:] for name in counter.report()["images"]] == ["001.png", "002.png"]
    with pytest.raises(UnreadableImage) as caught:
        counter.update({"replaced": torch.tensor([-1, 5])})
    assert "3 images cannot be read, 2 are allowed" in caught.value.problem
    assert "doctor --images" in caught.value.remedy


def test_counter_takes_batches_without_the_key(source):
    counter = UnreadableCounter(0)
    counter.update({"pixels": torch.zeros(1)})
    assert counter.report() == {"count": 0, "limit": 0, "images": []}


def test_error_of_a_worker_is_one_line_again(damaged):
    dataset = ImageDataset(damaged, ImageTransform(SIDE), skip=SkipPolicy(1))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(UnreadableImage) as caught:
        list(loader)
    error = as_raised_in_worker(caught.value)
    assert error.problem.startswith("2 images cannot be read, 1 are allowed")
    assert "\n" not in error.problem
    assert error.remedy.startswith("Find them all")


def test_names_survive_packing(tmp_path):
    assert unpack_name(pack_name("a/b.tar!ä.png")) == "a/b.tar!ä.png"
    assert unpack_name(pack_name("x" * 1000 + "end")).endswith("xend")


def test_running_out_of_files_is_not_an_unreadable_image(tmp_path, monkeypatch):
    import errno

    source = FolderImages(write_folder(tmp_path, 1))

    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(OSError, match="Too many"):
        source.read(0)


# Parts


@given(
    st.integers(1, 400),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.integers(0, 5),
    st.sets(st.integers(0, 399), max_size=50),
)
def test_smaller_part_lies_in_the_larger_one(n, a, b, seed, excluded):
    exclude = np.array(sorted(each for each in excluded if each < n), dtype=np.int64)
    small, large = (
        select_positions(n, fraction=part, count=None, seed=seed, exclude=exclude)
        for part in sorted((a, b))
    )
    assert set(small.tolist()) <= set(large.tolist())
    assert not set(large.tolist()) & set(exclude.tolist())
    assert (np.diff(large) > 0).all()
    left = n - len(exclude)
    assert len(large) == (max(1, int(max(a, b) * left + 1e-9)) if left else 0)
    by_count = select_positions(n, fraction=None, count=len(small), seed=seed, exclude=exclude)
    assert np.array_equal(by_count, small) or len(small) == 0


def test_part_depends_on_the_seed_and_all_is_all():
    parts = [select_positions(100, fraction=0.25, count=None, seed=seed) for seed in (0, 1)]
    assert not np.array_equal(*parts)
    assert [len(part) for part in parts] == [25, 25]
    assert select_positions(9, fraction=None, count=None, seed=0).tolist() == list(range(9))
    assert len(select_positions(100, fraction=0.29, count=None, seed=0)) == 29


def test_part_larger_than_the_whole_is_refused():
    with pytest.raises(DataError, match=r"asks for 10 images, but only 9"):
        select_positions(10, fraction=None, count=10, seed=0, exclude=np.array([3]))


def test_damaged_bytes_of_many_kinds_are_unreadable_and_nothing_else(tmp_path):
    from kuea_mllm.data.source import decode_image

    whole = encoded(0, (60, 60), "JPEG")
    rng = np.random.default_rng(0)
    for cut in range(0, len(whole), 97):
        for data in (whole[:cut], whole[:cut] + rng.bytes(50) + whole[cut + 50 :]):
            try:
                decode_image(data, "x")
            except UnreadableImage as error:
                assert error.problem.startswith("image x cannot be read")
