"""What studies over several mini worlds share: their folder, the worlds, and the work on each."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from kuea_mllm.errors import OutputError, UserError
from kuea_mllm.io import read_json, write_json

TRAIN_IMAGES = 12_000
HELDOUT_IMAGES = 512


def open_study(out: Path, settings: Mapping[str, Any]) -> None:
    """Create the folder of a study, or find one that was begun with equal settings.

    Raises:
        OutputError: If `out` holds something else.
    """
    record = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not out.exists():
        out.mkdir(parents=True)
        write_json(record, settings)
    elif not record.exists():
        raise OutputError(f"output {out} exists and holds no study.", "Choose another --out.")
    elif (found := read_json(record)) != settings:
        names = dict.fromkeys((*settings, *found))
        differing = [name for name in names if found.get(name) != settings.get(name)]
        raise OutputError(
            f"output {out} holds a study with other settings: {', '.join(differing)}.",
            "Choose another --out, or repeat the settings in settings.json.",
        )


def find_world(worlds: Path | None, seed: int) -> Path | None:
    """Return the built world of a seed; None if there is no folder of built worlds.

    Raises:
        UserError: If the folder lacks it.
    """
    if worlds is None:
        return None
    world = worlds / f"seed{seed}"
    if not (world / "world.json").is_file():
        raise UserError(
            f"world {world} is missing or incomplete.",
            f"Build it: kuea-mllm world build --seed {seed} --out {world}",
        )
    return world


def obtain_world(out: Path, seed: int, found: Path | None) -> Path:
    """Return the world that was found, or else the study's own, which is built if missing."""
    if found is not None:
        return found
    # Heavy imports belong to the process that does the work.
    from kuea_mllm.miniworld import ASSETS
    from kuea_mllm.miniworld.build import build_world

    world = out / "worlds" / f"seed{seed}"
    if not world.exists():
        # One teacher for all seeds, as DINOv2 is one model: the spread is CLIP's and LLaVA's.
        build_world(world, seed=seed, teacher=ASSETS / "teacher", progress=False)
    return world


def world_identity(world: Path) -> str:
    """Hash the weights of CLIP and LLaVA; the teacher is the same in every world."""
    digest = hashlib.sha256()
    for part in ("clip", "llava"):
        digest.update((world / part / "model.safetensors").read_bytes())
    return digest.hexdigest()


def is_measured(out: Path, seed: int, world: Path | None) -> bool:
    """Tell whether a study has the result of a seed.

    Raises:
        OutputError: If it has, of another world than `world`.
    """
    result = out / f"seed{seed}" / "result.json"
    if not result.exists():
        return False
    if world is not None and read_json(result)["world"] != world_identity(world):
        raise OutputError(
            f"{result} was measured on another world than {world}.", "Choose another --out."
        )
    return True


def write_inputs(out: Path, *, split: str, train_images: int, questions: int) -> None:
    """Write pictures and questions where they are missing: `images`, `heldout`, `tasks`."""
    from kuea_mllm.miniworld.images import write_images
    from kuea_mllm.miniworld.tasks import write_tasks

    # The same pictures and questions for every seed: spread then comes from models, not data.
    if not (out / "images").exists():
        write_images(out / "images", split="train", count=train_images, seed=0)
    if not (out / "heldout").exists():
        write_images(out / "heldout", split=split, count=HELDOUT_IMAGES, seed=1)
    if not (out / "tasks").exists():
        write_tasks(out / "tasks", split=split, questions_per_task=questions, seed=0)


def run_seeds(work: Callable[[int], None], seeds: Sequence[int], *, jobs: int) -> None:
    """Do the work of every seed: here for one job, else in as many processes at once.

    Args:
        work: Called with a seed; must be picklable for several jobs.
        seeds: What is still to do.
        jobs: Seeds at once.
    """
    if jobs == 1:
        for seed in seeds:
            work(seed)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_limit_threads,
        initargs=(threads,),
    ) as pool:
        for future in [pool.submit(work, seed) for seed in seeds]:
            future.result()


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
