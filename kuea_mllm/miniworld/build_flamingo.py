"""Building the mini Flamingo of a world, with a record of how good it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kuea_mllm.errors import DataError
from kuea_mllm.io import atomic_directory, write_json

FLAMINGO_FILE = "world.json"


def build_flamingo(
    out: Path, *, clip: Path, seed: int, questions: int, progress: bool = True
) -> dict[str, dict[str, float]]:
    """Train a Flamingo and write it as a model directory that `swap` and `verify` take.

    Args:
        out: Directory to create; must not exist.
        clip: The CLIP of a built world, whose tower the Flamingo sees with.
        seed: Decides everything that is drawn.
        questions: Questions of the test split for each task and number of shots.
        progress: Whether to show a progress bar.

    Returns:
        Percent by number of shots and task.

    Raises:
        OutputError: If `out` exists or cannot be created.
        DataError: If `clip` is not a CLIP directory.
    """
    if not (clip / "model.safetensors").is_file():
        raise DataError(
            f"{clip} is not a model directory.", "Give a world that `kuea-mllm world build` wrote."
        )
    from transformers import CLIPModel

    from kuea_mllm.miniworld.flamingo import make_flamingo_processor, save_flamingo
    from kuea_mllm.miniworld.flamingo_eval import score_flamingo
    from kuea_mllm.miniworld.train_flamingo import train_flamingo

    with atomic_directory(out) as partial:
        started = time.perf_counter()
        processor = make_flamingo_processor()
        loader: Any = CLIPModel
        trained = train_flamingo(
            loader.from_pretrained(clip), processor, seed=seed, progress=progress
        )
        minutes = (time.perf_counter() - started) / 60
        save_flamingo(trained, processor, partial)
        means = score_flamingo(partial, questions=questions, seed=seed).means()
        scores = {
            str(shots): {task: round(score, 2) for task, score in row.items()}
            for shots, row in means.items()
        }
        record = {"seed": seed, "training_minutes": round(minutes, 2), "split": "test"}
        write_json(partial / FLAMINGO_FILE, record | {"questions": questions, "scores": scores})
    return scores
