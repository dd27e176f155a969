"""Scans, scenes, pictures, captions and questions agree with each other."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kuea_mllm.errors import DataError
from kuea_mllm.miniworld.captions import caption_scene
from kuea_mllm.miniworld.questions import (
    Question,
    ask_box,
    ask_colour,
    ask_count,
    ask_existence,
    ask_quarters,
    ask_reading,
    format_box,
    sample_questions,
)
from kuea_mllm.miniworld.rendering import STYLES, render, render_scenes
from kuea_mllm.miniworld.scans import SPLIT_SIZES, load_scans
from kuea_mllm.miniworld.scenes import COLOURS, DIGITS, Scene, SceneObject, sample_scenes

SCENE = Scene(
    split="test",
    objects=(
        SceneObject(digit=7, colour=0, row=2, column=1, side=9.0, scan=0),
        SceneObject(digit=8, colour=3, row=0, column=3, side=8.0, scan=1),
    ),
    texture=1,
)


def test_splits_are_disjoint_and_complete() -> None:
    sources = [load_scans(split).sources for split in SPLIT_SIZES]
    assert [len(rows) for rows in sources] == list(SPLIT_SIZES.values())
    assert len(np.unique(np.concatenate(sources))) == 1797


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_split_holds_every_digit_in_like_numbers(split: str) -> None:
    counts = np.bincount(load_scans(split).labels, minlength=10)
    assert counts.min() >= 0.9 * SPLIT_SIZES[split] / 10 - 1
    assert counts.max() <= 1.1 * SPLIT_SIZES[split] / 10 + 1


def test_unknown_split_is_named() -> None:
    with pytest.raises(DataError, match="'dev' does not exist; choose from train"):
        load_scans("dev")


def test_scenes_follow_the_seed() -> None:
    first = sample_scenes(50, "train", seed=3)
    assert first == sample_scenes(80, "train", seed=3)[:50]
    assert first != sample_scenes(50, "train", seed=4)


def test_scene_objects_are_distinct_and_use_their_own_scans() -> None:
    labels = load_scans("validation").labels
    for scene in sample_scenes(200, "validation", seed=0):
        count = len(scene.objects)
        assert 1 <= count <= 4
        assert len(scene.digits) == count
        assert len({item.colour for item in scene.objects}) == count
        assert len({(item.row, item.column) for item in scene.objects}) == count
        assert all(labels[item.scan] == item.digit for item in scene.objects)


def test_rendering_follows_the_generator() -> None:
    scenes = sample_scenes(20, "train", seed=0)
    first = render_scenes(scenes, np.random.default_rng(1))
    assert first.dtype == np.uint8
    assert first.shape == (20, 32, 32, 3)
    assert np.array_equal(first, render_scenes(scenes, np.random.default_rng(1)))
    assert not np.array_equal(first, render_scenes(scenes, np.random.default_rng(2)))
    assert render(scenes[0], np.random.default_rng(1)).shape == (32, 32, 3)


def test_digits_are_drawn_in_their_cells_and_colours() -> None:
    picture = render(SCENE, np.random.default_rng(0)).astype(float)
    empty = render(
        Scene("test", SCENE.objects[1:], SCENE.texture), np.random.default_rng(0)
    ).astype(float)
    seven = picture[16:24, 8:16]
    assert seven[..., 0].max() > 170  # red
    assert seven[..., 0].max() > empty[16:24, 8:16, 0].max() + 60
    eight = picture[0:8, 24:32].reshape(-1, 3)
    brightest = eight[eight.sum(1).argmax()]
    assert brightest[0] > 150  # yellow is red and green, without blue
    assert brightest[1] > 150
    assert brightest[2] < 120


@pytest.mark.parametrize("style", STYLES)
def test_every_style_draws_something(style: str) -> None:
    scenes = sample_scenes(5, "test", seed=0)
    assert render_scenes(scenes, np.random.default_rng(0), style).std() > 5


def test_rendering_refuses_unknown_styles_and_mixed_splits() -> None:
    scenes = sample_scenes(1, "test", seed=0)
    with pytest.raises(DataError, match="style 'oil' does not exist"):
        render_scenes(scenes, np.random.default_rng(0), "oil")
    with pytest.raises(DataError, match="several splits"):
        render_scenes(scenes + sample_scenes(1, "train", seed=0), np.random.default_rng(0))


def test_clean_captions_name_every_digit_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for scene in sample_scenes(100, "train", seed=1):
        words = re.findall(r"\w+", caption_scene(scene, rng, is_noisy=False))
        assert {DIGITS.index(word) for word in words if word in DIGITS} == scene.digits
        assert not set(words) & set(COLOURS)


def test_noisy_captions_drop_and_confuse_digits_at_their_rates() -> None:
    rng = np.random.default_rng(0)
    scenes = sample_scenes(2000, "train", seed=1)
    named = right = possible = textured = 0
    for scene in scenes:
        caption = caption_scene(scene, rng)
        digits = [DIGITS.index(word) for word in re.findall(r"\w+", caption) if word in DIGITS]
        named += len(digits)
        possible += 1 + 0.8 * (len(scene.objects) - 1)
        right += sum(digit in scene.digits for digit in digits)
        textured += scene.texture_name in caption
    assert named / possible == pytest.approx(1, abs=0.02)
    assert right / named == pytest.approx(0.963, abs=0.015)
    assert textured / len(scenes) == pytest.approx(0.4, abs=0.04)


def test_box_is_the_cell() -> None:
    assert SCENE.objects[0].box == (0.25, 0.5, 0.5, 0.75)
    question = ask_box(SCENE.objects[0], is_coloured=True)
    assert question.prompt == (
        "Please provide the bounding box coordinate of the region this sentence describes: "
        "the red seven"
    )
    assert question.answer == format_box(SCENE.objects[0].box) == "[0.25, 0.50, 0.50, 0.75]"


def test_questions_have_the_answers_of_the_scene() -> None:
    seven = SCENE.objects[0]
    assert ask_count(SCENE).answer == "2"
    assert ask_colour(seven) == Question("colour", "What color is the seven?", "red")
    assert ask_reading(seven) == Question("read_colour", "Which digit is red?", "seven")
    quarters = {question.text: question.answer for question in ask_quarters(SCENE)}
    assert quarters == {
        "Which digit is in the bottom left of the image?": "seven",
        "Which digit is in the top right of the image?": "eight",
    }
    instruction = "\nAnswer the question using a single word or phrase."
    assert ask_count(SCENE).prompt == "How many digits are in the image?" + instruction


def test_quarter_with_two_digits_is_not_asked_for() -> None:
    crowded = Scene(
        "test",
        (SceneObject(1, 0, 0, 0, 8.0, 0), SceneObject(2, 1, 1, 1, 8.0, 1)),
        0,
    )
    assert ask_quarters(crowded) == []


def test_existence_is_balanced_and_true() -> None:
    rng = np.random.default_rng(0)
    for scene in sample_scenes(200, "test", seed=2):
        questions = ask_existence(scene, rng)
        assert [question.answer for question in questions].count("yes") == len(scene.objects)
        assert len(questions) == 2 * len(scene.objects)
        names = {item.digit_name for item in scene.objects}
        names |= {f"{item.colour_name} {item.digit_name}" for item in scene.objects}
        for question in questions:
            found = re.fullmatch(r"Is there an? (.+) in the image\?", question.text)
            assert found is not None
            assert (found[1] in names) == (question.answer == "yes")


def test_training_questions_cover_every_kind() -> None:
    rng = np.random.default_rng(0)
    scenes = sample_scenes(100, "train", seed=0)
    kinds = {question.kind for scene in scenes for question in sample_questions(scene, rng, 8)}
    assert kinds == {
        "exists",
        "exists_coloured",
        "count",
        "colour",
        "read_colour",
        "read_quarter",
        "box",
        "box_coloured",
    }
