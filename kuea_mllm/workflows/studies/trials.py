"""One alignment on the mini world, measured: the unit that studies are made of.

A trial is a value; its result is a file named by the hash of that value. A study that was stopped
therefore goes on where it was, and one that grew does not repeat what it has.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kuea_mllm import __version__
from kuea_mllm.config.recipes import find_recipe
from kuea_mllm.errors import UserError
from kuea_mllm.io import atomic_directory, read_json, write_json
from kuea_mllm.log import LOGGER


@dataclass(frozen=True)
class Trial:
    """What is aligned, how, and on what it is measured.

    Attributes:
        method: "original" (nothing is done), "projection" (the teacher mapped into CLIP space), or
            any other name for an alignment with `settings`.
        world: Seed of the world: `WORLDS/seed<world>`.
        settings: Keys of the recipe `align/miniworld` that are changed; for "projection" `ridge`.
        clip: Folder of the CLIP inside the world.
        teacher: Folder of the teacher, relative to the folder of the worlds.
        split: Scans that everything is measured on.
        scores: What is measured: "encoder", and "llava" (which needs `clip` to be its tower).
    """

    method: str
    world: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    clip: str = "clip"
    teacher: str = "teacher"
    split: str = "validation"
    scores: tuple[str, ...] = ("encoder",)

    @property
    def key(self) -> str:
        """Name of the result: changes with anything that changes it."""
        recipe = find_recipe("align/miniworld").text
        content = json.dumps([asdict(self), recipe, __version__], sort_keys=True)
        return f"{self.method}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class TrialPlace:
    """Where trials read and write.

    Attributes:
        out: Folder of the study.
        worlds: Folder of built worlds.
        train_images: Pictures to align on.
        questions: Questions for each task of the mini LLaVA.
    """

    out: Path
    worlds: Path
    train_images: int = 12_000
    questions: int = 600

    @property
    def images(self) -> Path:
        """The pack of pictures to align on; the same for every trial."""
        return self.out / "images"

    def heldout(self, split: str) -> Path:
        """Pictures that the kernel gap is measured on."""
        return self.out / f"heldout-{split}"

    def tasks(self, split: str) -> Path:
        """Questions for the mini LLaVA."""
        return self.out / f"tasks-{split}"

    def result(self, trial: Trial) -> Path:
        """File of a result."""
        return self.out / "trials" / trial.key / "result.json"


def run_trials(place: TrialPlace, trials: Sequence[Trial], *, jobs: int) -> list[dict[str, Any]]:
    """Run what is missing and return all results, in the order of the trials.

    Raises:
        UserError: If a world or teacher is missing.
    """
    for trial in trials:
        _require(place.worlds / f"seed{trial.world}" / trial.clip)
        _require(place.worlds / trial.teacher)
    _write_shared(place, {trial.split for trial in trials})
    todo = list({t.key: t for t in trials if not place.result(t).exists()}.values())
    LOGGER.info("%d of %d trials to do, %d at once", len(todo), len(trials), jobs)
    if jobs == 1:
        for trial in todo:
            run_trial(place, trial)
    elif todo:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
            running = {pool.submit(run_trial, place, trial): trial for trial in todo}
            for number, done in enumerate(as_completed(running), start=1):
                done.result()
                LOGGER.info("%d/%d %s", number, len(todo), running[done].key)
    return [read_json(place.result(trial)) for trial in trials]


def run_trial(place: TrialPlace, trial: Trial) -> dict[str, Any]:
    """Run one trial and write its result."""
    directory = place.result(trial).parent
    with atomic_directory(directory) as partial:
        world = place.worlds / f"seed{trial.world}"
        vision, tower, alignment = _make(place, trial, world, partial)
        result: dict[str, Any] = {"trial": asdict(trial), "alignment": alignment}
        if "encoder" in trial.scores:
            result["encoder"] = _score_encoder(vision, world / trial.clip, trial.split)
        if "llava" in trial.scores:
            result["llava"] = _score_llava(place, trial, world, tower, partial)
        write_json(partial / "result.json", result)
    return result


def _make(
    place: TrialPlace, trial: Trial, world: Path, directory: Path
) -> tuple[Callable[[Any], Any], Path | None, dict[str, Any]]:
    """Return what embeds pictures, the aligned tower if any, and what training measured."""
    from kuea_mllm.towers.reading.load import load_tower

    if trial.method == "original":
        return load_tower(world / trial.clip).model, None, {}
    if trial.method == "projection":
        embed, fitted = _project(place, trial, world)
        return embed, None, fitted
    result = _align(place, trial, world, directory / "align")
    return (
        load_tower(result.tower).model,
        result.tower,
        {"before": result.before, "after": result.after, "seconds": result.seconds},
    )


def _align(place: TrialPlace, trial: Trial, world: Path, out: Path) -> Any:
    from kuea_mllm.alignment.run import run_alignment
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe

    fixed = {
        "student.model": str(world / trial.clip),
        "teacher.model": str(place.worlds / trial.teacher),
        "data.images": str(place.images),
        "data.heldout": str(place.heldout(trial.split)),
        "runtime.device": "cpu",
        "runtime.seed": trial.world,
        "targets.cache": True,
        "targets.directory": str(place.out / "cache"),
        "checkpoint.every_minutes": None,
    }
    recipe = load_recipe("align/miniworld", AlignRecipe, settings={**fixed, **trial.settings})
    return run_alignment(recipe, out, progress=False)


def _project(
    place: TrialPlace, trial: Trial, world: Path
) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    import torch

    from kuea_mllm.alignment.projection import fit_projection
    from kuea_mllm.data.dataset import ImageDataset
    from kuea_mllm.data.open import open_images
    from kuea_mllm.data.transforms import ImageTransform, unit_pixels
    from kuea_mllm.miniworld.build import load_teacher_tower
    from kuea_mllm.teachers import load_teacher
    from kuea_mllm.towers.model.encode import TowerEncoder
    from kuea_mllm.towers.reading.load import load_tower

    tower = load_tower(world / trial.clip)
    student = TowerEncoder(tower)
    teacher = load_teacher(place.worlds / trial.teacher)
    source = open_images(str(place.images))
    loader = torch.utils.data.DataLoader(
        ImageDataset(source, ImageTransform.from_spec(tower.spec)), batch_size=500
    )
    with torch.no_grad():
        pairs = (
            (teacher(pixels), student(pixels))
            for pixels in (unit_pixels(batch["pixels"]) for batch in loader)
        )
        found = fit_projection(pairs, ridge=float(trial.settings["ridge"]))
    embed_teacher = load_teacher_tower(place.worlds / trial.teacher)
    return lambda pixels: embed_teacher(pixels) @ found.weight.T, {"residual": found.residual}


def _score_encoder(vision: Callable[[Any], Any], clip: Path, split: str) -> dict[str, float]:
    from kuea_mllm.miniworld.encoder_eval import evaluate_encoder

    return evaluate_encoder(vision, clip, split=split)


def _score_llava(
    place: TrialPlace, trial: Trial, world: Path, tower: Path | None, directory: Path
) -> dict[str, float]:
    from kuea_mllm.workflows.studies.steps import answer_questions, swap_into_llava

    model = world / "llava"
    if tower is not None:
        model = directory / "llava"
        swap_into_llava(world, tower, model)
    summary = answer_questions(
        model,
        place.tasks(trial.split),
        directory / "answers",
        seed=trial.world,
        show_progress=False,
    )
    scores = {
        name: column["score"] * 100 / column["scale"] for name, column in summary["columns"].items()
    }
    scores["average"] = float(np.mean(list(scores.values())))
    return scores


def _write_shared(place: TrialPlace, splits: set[str]) -> None:
    from kuea_mllm.miniworld.images import write_images
    from kuea_mllm.miniworld.tasks import write_tasks

    place.out.mkdir(parents=True, exist_ok=True)
    _require_same_amounts(place)
    if not place.images.exists():
        _pack_images(place)
    for split in splits:
        if not place.heldout(split).exists():
            write_images(place.heldout(split), split=split, count=512, seed=1)
        if not place.tasks(split).exists():
            write_tasks(place.tasks(split), split=split, questions_per_task=place.questions, seed=0)


def _require_same_amounts(place: TrialPlace) -> None:
    # Neither is part of a trial's key: results of other amounts would be taken for these.
    record = place.out / "place.json"
    wanted = {"train_images": place.train_images, "questions": place.questions}
    if not record.exists():
        write_json(record, wanted)
        return
    found = read_json(record)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"study {place.out} was begun with {name} {found.get(name)}, now it is {value}.",
                "Give the same number as before, or choose another folder.",
            )


def _pack_images(place: TrialPlace) -> None:
    """Write the pictures as a pack: a study reads them a hundred times, and decodes them once."""
    from kuea_mllm.data.open import open_images
    from kuea_mllm.data.packing import write_pack
    from kuea_mllm.data.transforms import ImageTransform
    from kuea_mllm.miniworld.images import write_images
    from kuea_mllm.miniworld.scenes import CANVAS

    with tempfile.TemporaryDirectory(dir=place.out) as folder:
        pictures = Path(folder) / "pictures"
        write_images(pictures, split="train", count=place.train_images, seed=0)
        write_pack(
            open_images(str(pictures)),
            ImageTransform(CANVAS),
            place.images,
            described="mini world, train, seed 0",
            workers=0,
            progress=False,
        )


def _require(folder: Path) -> None:
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{folder} is no model directory.",
            "Build what is missing: kuea-mllm world build, kuea-mllm world extras.",
        )


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
