"""Few-shot scores of a mini Flamingo, through the runtime that also evaluates the real one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kuea_mllm.adapters.fewshot_text import TEXT_ONLY_SHOTS
from kuea_mllm.miniworld.flamingo import (
    TASKS,
    ScenesByCount,
    draw_pictures,
    draw_wording,
    score_answer,
    write_example,
)
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import Scene, sample_scenes

if TYPE_CHECKING:
    from kuea_mllm.adapters.openflamingo.runtime import OpenFlamingoRuntime

SHOTS = (0, 4)
_POOL = 256
_BATCH = 50
_BEAMS = 3
_NEW_TOKENS = {"caption": 20}
_SHORT = 5
_SEED = 97


@dataclass(frozen=True)
class FewShotScores:
    """Scores of one model.

    Attributes:
        per_question: By task and number of shots, one score from 0 to 1 for each question. The
            questions are the same for every model, and so are the demonstrations.
        seconds: Time that it took.
    """

    per_question: dict[str, dict[int, list[float]]]
    seconds: float

    def means(self) -> dict[int, dict[str, float]]:
        """Return percent by shots and task, with the average of the tasks."""
        table: dict[int, dict[str, float]] = {}
        for shots in next(iter(self.per_question.values())):
            row = {
                task: 100 * float(np.mean(scores[shots]))
                for task, scores in self.per_question.items()
            }
            table[shots] = row | {"average": float(np.mean(list(row.values())))}
        return table


def score_flamingo(
    model: Path,
    *,
    split: str = "test",
    questions: int = 200,
    shots: Sequence[int] = SHOTS,
    seed: int = 0,
) -> FewShotScores:
    """Ask a Flamingo directory, with demonstrations drawn from training pictures.

    Zero shots are two demonstrations without their images, as in the published evaluation. All
    captions of a prompt, demonstrated and wanted, have one form out of five; names are two words
    without meaning for pictures with so many digits: without pictures one can only guess.

    Args:
        model: Directory in Hugging Face form.
        split: Split of the scans that the questions are about.
        questions: Questions for each task and number of shots, one picture each.
        shots: Numbers of demonstrations.
        seed: Decides pictures, questions and demonstrations.
    """
    from PIL import Image

    from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter

    runtime: Any = OpenFlamingoAdapter().open_runtime(model, dtype="float32", device="cpu")
    started = time.perf_counter()
    found: dict[str, dict[int, list[float]]] = {}
    for number, task in enumerate(TASKS):
        asked = sample_scenes(questions, split, seed=_SEED + 10 * seed + number)
        demonstrated = sample_scenes(_POOL, "train", seed=_SEED + 10 * seed + number + 5)
        rng = np.random.default_rng([seed, _SEED, number])
        pictures, shown = (
            [Image.fromarray(picture) for picture in render_scenes(scenes, rng)]
            for scenes in (asked, demonstrated)
        )
        found[task] = {
            count: _answer(
                runtime, task, count, (asked, pictures), (demonstrated, shown), [seed, number]
            )
            for count in shots
        }
    return FewShotScores(found, time.perf_counter() - started)


def _answer(
    runtime: OpenFlamingoRuntime,
    task: str,
    shots: int,
    asked: tuple[list[Scene], list[Any]],
    pool: tuple[list[Scene], list[Any]],
    seed: list[int],
) -> list[float]:
    prompts, images, expected = [], [], []
    scenes = ScenesByCount(pool[0])
    for row, (scene, picture) in enumerate(zip(*asked, strict=True)):
        # A stream of its own for each question: it does not depend on the number of shots.
        rng = np.random.default_rng([*seed, row])
        wording = draw_wording(rng, digits=len(scene.objects))
        prompt, answer = write_example(task, scene, wording)
        text, shown = "", []
        count = shots or TEXT_ONLY_SHOTS
        for chosen in draw_pictures(task, wording, scenes, rng, count, is_balanced=True):
            before, after = write_example(task, pool[0][chosen], wording)
            text += f"{'<image>' if shots else ''}{before}{after}<|endofchunk|>\n"
            shown += [pool[1][chosen]] if shots else []
        prompts.append(f"{text}<image>{prompt}")
        images.append([*shown, picture])
        expected.append(answer)
    scores: list[float] = []
    for start in range(0, len(prompts), _BATCH):
        rows = slice(start, start + _BATCH)
        answers = runtime.complete(
            prompts[rows],
            images[rows],
            max_new_tokens=_NEW_TOKENS.get(task, _SHORT),
            num_beams=_BEAMS,
        )
        scores += [
            score_answer(task, found, right)
            for found, right in zip(answers, expected[rows], strict=True)
        ]
    return scores
