"""The mini Flamingo: its texts, its training, its scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from kuea_mllm.adapters.conformance import problems_of
from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.captions import PREFIXES
from kuea_mllm.miniworld.flamingo import (
    NAMES,
    TASKS,
    ScenesByCount,
    Wording,
    build_flamingo_tokenizer,
    draw_pictures,
    draw_wording,
    make_flamingo_processor,
    save_flamingo,
    score_answer,
    write_example,
)
from kuea_mllm.miniworld.flamingo_eval import score_flamingo
from kuea_mllm.miniworld.scenes import DIGITS, sample_scenes
from kuea_mllm.miniworld.train_flamingo import train_flamingo
from kuea_mllm.miniworld.training import Schedule
from kuea_mllm.towers.model.fingerprint import fingerprint_state
from kuea_mllm.towers.reading.load import load_tower

SCENES = sample_scenes(40, "train", seed=0)


def briefly_trained(seed: int) -> Any:
    clip = CLIPModel.from_pretrained(ASSETS / "clip")
    return train_flamingo(
        clip,
        make_flamingo_processor(),
        seed=seed,
        pictures=64,
        schedule=Schedule(steps=6, lr=3e-3, warmup_steps=1),
        progress=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("flamingo") / "model"
    save_flamingo(briefly_trained(0), make_flamingo_processor(), place)
    return place


def test_every_word_is_one_token() -> None:
    tokenizer = build_flamingo_tokenizer()
    rng = np.random.default_rng(0)
    for scene in SCENES:
        for task in TASKS:
            wording = draw_wording(rng, digits=len(scene.objects))
            for text in write_example(task, scene, wording):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.decode(ids) == text
                # One token for a word, one for a mark.
                marks = sum(text.count(mark) for mark in ":?,")
                assert len(ids) == len(text.replace(":", " ").split()) + marks


def test_answers_are_true() -> None:
    for scene in SCENES:
        wording = Wording(3, {len(scene.objects): "dax"})
        caption = write_example("caption", scene, wording)[1]
        assert caption.startswith(f"{PREFIXES[3]} ")
        named = [word for word in re.findall("[a-z]+", caption) if word in DIGITS]
        assert named == [DIGITS[digit] for digit in sorted(scene.digits)]
        assert write_example("count", scene, wording)[1] == str(len(scene.digits))
        assert write_example("texture", scene, wording)[1] == scene.texture_name
        assert write_example("naming", scene, wording)[1] == "dax"


def test_names_mean_nothing_by_themselves() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_wording(rng, digits=2) for _ in range(300)]
    assert all(len(set(wording.names.values())) == 2 for wording in drawn)
    said = {name: sum(w.names[2] == name for w in drawn) for name in NAMES}
    assert min(said.values()) > 25
    assert {count for wording in drawn for count in wording.names} == {1, 2, 3, 4}


def test_demonstrations_hold_both_names_as_often() -> None:
    rng = np.random.default_rng(0)
    scenes = ScenesByCount(SCENES)
    orders = set()
    for _ in range(20):
        wording = Wording(0, {1: "dax", 3: "wug"})
        rows = draw_pictures("naming", wording, scenes, rng, 4, is_balanced=True)
        counts = tuple(len(SCENES[row].objects) for row in rows)
        assert sorted(counts) == [1, 1, 3, 3]
        orders.add(counts)
    assert len(orders) > 2


def test_scores_follow_the_published_post_processing() -> None:
    assert score_answer("count", "2", "2") == 1
    assert score_answer("count", " 2 ", "2") == 1
    assert score_answer("count", "3Question", "3") == 1
    assert score_answer("count", "3", "2") == 0
    right = "a photo of two and five"
    assert score_answer("caption", right, right) == 1
    assert score_answer("caption", f"{right}Output:more", right) == 1
    assert score_answer("caption", "a photo of two", right) == pytest.approx(8 / 10)
    assert score_answer("caption", "", right) == 0


def test_training_is_repeatable_and_leaves_the_tower_alone(folder: Path) -> None:
    again, other = briefly_trained(0).state_dict(), briefly_trained(1).state_dict()
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    name = "model.resampler.latents"
    assert not torch.equal(other[name], saved[name])
    tower = {k.removeprefix("model.vision_tower."): t for k, t in saved.items() if "tower" in k}
    assert fingerprint_state(tower) == load_tower(ASSETS / "clip").fingerprint


def test_training_learns_something() -> None:
    losses: list[float] = []
    from kuea_mllm.miniworld import train_flamingo as module

    keep = module.optimise

    def optimise(*arguments: Any, **options: Any) -> list[float]:
        losses.extend(keep(*arguments, **options))
        return losses

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "optimise", optimise)
    briefly_trained(0)
    patch.undo()
    assert losses[-1] < 0.9 * losses[0]


def test_result_is_an_openflamingo_directory(folder: Path) -> None:
    assert problems_of(OpenFlamingoAdapter(), folder) == []


def test_scores_are_those_of_single_questions_and_repeatable(folder: Path) -> None:
    first, second = (score_flamingo(folder, questions=3, shots=(0, 2)) for _ in range(2))
    assert first.per_question == second.per_question
    assert set(first.per_question) == set(TASKS)
    means = first.means()
    assert set(means) == {0, 2}
    for shots, row in means.items():
        for task in TASKS:
            expected = 100 * float(np.mean(first.per_question[task][shots]))
            assert row[task] == pytest.approx(expected)
        assert row["average"] == pytest.approx(float(np.mean([row[task] for task in TASKS])))


def test_zero_shots_show_two_texts_and_one_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kuea_mllm.adapters.openflamingo.runtime import OpenFlamingoRuntime

    seen: list[tuple[str, int]] = []

    def complete(self: Any, prompts: Any, images: Any, **options: Any) -> list[str]:
        seen.extend((prompt, len(row)) for prompt, row in zip(prompts, images, strict=True))
        return ["" for _ in prompts]

    monkeypatch.setattr(OpenFlamingoRuntime, "complete", complete)
    score_flamingo(folder, questions=1, shots=(0, 4))
    for number, (prompt, images) in enumerate(seen):
        shots = (0, 4)[number % 2]
        assert prompt.count("<|endofchunk|>\n") == (shots or 2)
        assert prompt.count("<image>") == images == shots + 1
        assert prompt.rsplit("\n", 1)[1].startswith("<image>")
        assert prompt.endswith(":")
    captions = [prompt for prompt, _ in seen if "Output:" in prompt]
    for prompt in captions:
        # All in the one form that the demonstrations tell.
        assert sum(f"Output:{prefix}" in prompt for prefix in PREFIXES) == 1
