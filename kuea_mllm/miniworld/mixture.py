"""Conversations about pictures in LLaVA's own format, to tune a LLaVA with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kuea_mllm.io import atomic_directory, write_json
from kuea_mllm.miniworld.questions import Question, sample_questions
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import sample_scenes

MIXTURE_FILE = "mixture.json"
IMAGE_FOLDER = "images"


def write_mixture(folder: Path, *, split: str, count: int, seed: int, turns: int = 1) -> Path:
    """Write `folder/mixture.json` in the format of `llava_v1_5_mix665k.json`, and its pictures.

    Args:
        folder: Folder to create; must not exist.
        split: Split of the scans.
        count: Number of records, each with a picture of its own under `folder/images/`.
        seed: Decides pictures and questions.
        turns: Questions in each record. The mini LLaVA was trained on single ones.

    Returns:
        The path of the JSON file. Paths in it are relative to `folder/images`.

    Raises:
        OutputError: If `folder` exists or cannot be created.
        DataError: If there is no such split.
    """
    from PIL import Image

    rng = np.random.default_rng([seed, 7])
    scenes = sample_scenes(count, split, seed=seed + 700)
    pictures = render_scenes(scenes, rng)
    records = []
    with atomic_directory(folder) as partial:
        (partial / IMAGE_FOLDER).mkdir()
        for index, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
            name = f"{index:06d}.png"
            Image.fromarray(picture).save(partial / IMAGE_FOLDER / name)
            questions = sample_questions(scene, rng, turns)
            records.append(
                {"id": f"miniworld-{index:06d}", "image": name, "conversations": _turns(questions)}
            )
        write_json(partial / MIXTURE_FILE, records)
    return folder / MIXTURE_FILE


def _turns(questions: list[Question]) -> list[dict[str, str]]:
    turns = []
    for index, question in enumerate(questions):
        image = "<image>\n" if index == 0 else ""
        turns.append({"from": "human", "value": image + question.prompt})
        turns.append({"from": "gpt", "value": question.answer})
    return turns
