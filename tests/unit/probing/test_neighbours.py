"""All pairs of images, under several models."""

import numpy as np
import pytest

from kuea_mllm.errors import DataError
from kuea_mllm.probing import neighbours
from kuea_mllm.probing.neighbours import survey_pairs


def random_rows(count, width, seed):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def rows():
    original = random_rows(37, 8, 0)
    return {
        "original": original,
        "aligned": original + 0.5 * random_rows(37, 8, 1),
        "teacher": random_rows(37, 5, 2),
    }


def overlap_by_hand(first, second, k):
    shared = 0
    for a, b in zip(unit(first) @ unit(first).T, unit(second) @ unit(second).T, strict=True):
        own = int(np.argmax(a))
        near = [set(np.argsort(-np.delete(row, own), kind="stable")[:k].tolist()) for row in (a, b)]
        shared += len(near[0] & near[1])
    return shared / len(first) / k


@pytest.mark.parametrize("block", [4, 512])
def test_overlap_is_that_of_a_hand_computation(rows, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    found = survey_pairs(rows, ks=(1, 5, 10)).overlap
    for names, by_k in found.items():
        first, second = names.split("|")
        for k, share in by_k.items():
            assert share == pytest.approx(overlap_by_hand(rows[first], rows[second], k)), names


@pytest.mark.parametrize("block", [4, 512])
def test_means_cover_every_pair_of_different_images(rows, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    found = survey_pairs(rows)
    cosines = {name: unit(each) @ unit(each).T for name, each in rows.items()}
    off = ~np.eye(37, dtype=bool)
    for name, matrix in cosines.items():
        assert found.mean_cosine[name] == pytest.approx(matrix[off].mean(), abs=1e-6)
    gap = np.abs(cosines["aligned"] - cosines["teacher"])[off].mean()
    assert found.gap["aligned|teacher"] == pytest.approx(gap, abs=1e-6)


@pytest.mark.parametrize("block", [4, 512])
def test_the_pair_that_moved_most_comes_first(rows, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    cosines = {name: unit(each) @ unit(each).T for name, each in rows.items()}
    moved = survey_pairs(rows).moved
    for kind, difference in {
        "apart": cosines["original"] - cosines["aligned"],
        "together": cosines["aligned"] - cosines["original"],
        "blind": cosines["original"] - cosines["teacher"],
    }.items():
        row, column = np.unravel_index(np.argmax(np.triu(difference, 1)), difference.shape)
        first = moved[kind][0]
        assert (first.first, first.second) == (row, column), kind
        assert first.cosine["aligned"] == pytest.approx(cosines["aligned"][row, column], abs=1e-6)


def test_no_image_is_shown_twice_in_a_list(rows):
    for pairs in survey_pairs(rows, shown=100).moved.values():
        images = [image for pair in pairs for image in (pair.first, pair.second)]
        assert len(pairs) > 5
        assert len(images) == len(set(images))


def test_equal_models_agree_on_everything_and_move_nothing():
    rows = random_rows(20, 6, 0)
    found = survey_pairs({"original": rows, "aligned": rows})
    assert found.overlap["original|aligned"] == {1: 1.0, 5: 1.0, 10: 1.0}
    assert found.moved == {"apart": [], "together": []}
    assert found.gap["original|aligned"] == 0.0


def test_unrelated_models_agree_by_chance():
    rows = {"original": random_rows(400, 16, 0), "aligned": random_rows(400, 16, 1)}
    found = survey_pairs(rows, ks=(50,))
    assert found.overlap["original|aligned"][50] == pytest.approx(found.chance[50], abs=0.02)


def test_two_images_are_too_few():
    with pytest.raises(DataError, match="at least three images, found 2"):
        survey_pairs({"original": random_rows(2, 4, 0), "aligned": random_rows(2, 4, 1)})
