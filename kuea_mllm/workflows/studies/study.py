"""`kuea-mllm world study`: what alignment does, over several worlds, with spread."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kuea_mllm import __version__
from kuea_mllm.config.recipes import find_recipe
from kuea_mllm.io import atomic_directory, read_json, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import current_command, library_versions
from kuea_mllm.workflows.studies.worlds import (
    TRAIN_IMAGES,
    find_world,
    is_measured,
    obtain_world,
    open_study,
    run_seeds,
    world_identity,
    write_inputs,
)

PICTURES_PER_SET = 1000

# Each variant is the shipped recipe with some keys changed; the first is the method itself.
VARIANTS: dict[str, dict[str, object]] = {
    "kernel": {},
    "no_preservation": {"objective.preserve_weight": 0},
}


@dataclass(frozen=True)
class StudySettings:
    """What makes two studies comparable; a study resumes only under equal settings."""

    questions: int
    split: str
    variants: tuple[str, ...] = tuple(VARIANTS)
    train_images: int = TRAIN_IMAGES
    pictures_per_set: int = PICTURES_PER_SET
    recipe: str = ""
    version: str = __version__


def run_study(
    out: Path, *, seeds: int, worlds: Path | None, questions: int, split: str, jobs: int
) -> dict[str, Any]:
    """Build worlds, align each in every variant, measure towers and LLaVAs.

    A study that was interrupted goes on where it stopped: seeds that are finished are read, not
    repeated.

    Args:
        out: Directory of the study.
        seeds: Number of worlds, seeds 0 to seeds - 1.
        worlds: Built worlds `seed0`, `seed1`, ... to use; those missing are built in `out`.
        questions: Questions for each task.
        split: Scans that everything is measured on.
        jobs: Seeds in work at once, each in a process of its own.

    Returns:
        The content of `out/study.json`.

    Raises:
        OutputError: If `out` holds a study with other settings.
    """
    recipe = find_recipe("align/miniworld").text
    settings = StudySettings(
        questions=questions, split=split, recipe=hashlib.sha256(recipe.encode()).hexdigest()
    )
    given = {seed: find_world(worlds, seed) for seed in range(seeds)}
    open_study(out, asdict(settings))
    write_inputs(out, split=split, train_images=settings.train_images, questions=questions)
    todo = [seed for seed in range(seeds) if not is_measured(out, seed, given[seed])]
    LOGGER.info("%d of %d seeds to do, %d at once", len(todo), seeds, jobs)
    run_seeds(functools.partial(_study_seed, out, given, settings), todo, jobs=jobs)
    results = [read_json(out / f"seed{seed}" / "result.json") for seed in range(seeds)]
    study = {
        "settings": asdict(settings),
        "seeds": seeds,
        "rows": summarise(results),
        "per_seed": results,
        "versions": library_versions(),
        "command": current_command(),
    }
    write_json(out / "study.json", study)
    (out / "study.md").write_text(study_markdown(study), encoding="utf-8")
    return study


def summarise(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each measurement: original mean and spread, paired change per variant.

    Spread is the sample standard deviation over seeds; changes are paired within a seed.
    """
    rows = []
    for group in ("alignment", "encoder", "llava"):
        names = list(results[0]["original"][group])
        for name in names:
            original = np.array([result["original"][group][name] for result in results])
            row: dict[str, Any] = {
                "group": group,
                "measurement": name,
                "original": _mean_and_spread(original),
                "variants": {},
            }
            for variant in VARIANTS:
                values = np.array([result[variant][group][name] for result in results])
                change = values - original
                row["variants"][variant] = {
                    **_mean_and_spread(change),
                    "per_seed": [float(value) for value in change],
                    "seeds_up": int((change > 0).sum()),
                }
            rows.append(row)
    return rows


def study_markdown(study: Mapping[str, Any]) -> str:
    """Return the table of a study as Markdown."""
    seeds = study["seeds"]
    header = ["measurement", "original", *(f"{name}, change" for name in VARIANTS)]
    lines = [
        f"| {' | '.join(header)} |",
        "|" + "---|" + "---:|" * (len(header) - 1),
    ]
    for row in study["rows"]:
        cells = [_readable(row), _plain(row["original"], row["group"])]
        for variant in VARIANTS:
            change = row["variants"][variant]
            cells.append(f"{_signed(change, row['group'])} ({change['seeds_up']}/{seeds} up)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def print_study(study: Mapping[str, Any]) -> None:
    """Print the table of a study."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{study['seeds']} seeds, {study['settings']['split']} scans; "
        "mean and standard deviation over seeds, changes paired within a seed"
    )
    table.add_column("measurement")
    table.add_column("original", justify="right")
    for name in VARIANTS:
        table.add_column(f"{name}, change", justify="right")
    last_group = None
    for row in study["rows"]:
        if last_group not in (None, row["group"]):
            table.add_section()
        last_group = row["group"]
        table.add_row(
            _readable(row),
            _plain(row["original"], row["group"]),
            *(
                f"{_signed(row['variants'][name], row['group'])} "
                f"({row['variants'][name]['seeds_up']}/{study['seeds']} up)"
                for name in VARIANTS
            ),
        )
    Console().print(table)


def _study_seed(
    out: Path, given: Mapping[int, Path | None], settings: StudySettings, seed: int
) -> None:
    # Heavy imports belong to the process that does the work.
    from kuea_mllm.workflows.studies.steps import score_encoder

    world = obtain_world(out, seed, given[seed])
    with atomic_directory(out / f"seed{seed}") as partial:
        result: dict[str, Any] = {
            "seed": seed,
            "world": world_identity(world),
            "original": {
                "encoder": score_encoder(
                    world / "clip",
                    world,
                    split=settings.split,
                    per_set=settings.pictures_per_set,
                ),
                "llava": _score_llava(world / "llava", out, partial / "original", seed),
            },
        }
        for variant, changes in VARIANTS.items():
            result[variant], before = _study_variant(
                out, partial / variant, world, seed, changes, settings
            )
            result["original"]["alignment"] = before
        write_json(partial / "result.json", result)


def _study_variant(
    out: Path,
    directory: Path,
    world: Path,
    seed: int,
    changes: dict[str, object],
    settings: StudySettings,
) -> tuple[dict[str, Any], dict[str, float]]:
    from kuea_mllm.workflows.studies.steps import align_miniworld, score_encoder, swap_into_llava

    directory.mkdir()
    aligned = align_miniworld(
        world,
        out / "images",
        out / "heldout",
        directory / "align",
        settings={"runtime.seed": seed, **changes},
        show_progress=False,
    )
    swap_into_llava(world, aligned.tower, directory / "llava")
    measured = {
        "alignment": aligned.after,
        "encoder": score_encoder(
            aligned.tower, world, split=settings.split, per_set=settings.pictures_per_set
        ),
        "llava": _score_llava(directory / "llava", out, directory / "results", seed),
    }
    return measured, aligned.before


def _score_llava(model: Path, out: Path, results: Path, seed: int) -> dict[str, float]:
    from kuea_mllm.workflows.studies.steps import answer_questions

    summary = answer_questions(model, out / "tasks", results, seed=seed, show_progress=False)
    scores = {
        name: column["score"] * 100 / column["scale"] for name, column in summary["columns"].items()
    }
    scores["average"] = float(np.mean(list(scores.values())))
    return scores


def _mean_and_spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float | None]:
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "sd": spread}


def _readable(row: Mapping[str, Any]) -> str:
    name = str(row["measurement"]).replace("heldout_", "").replace("miniworld_", "")
    prefix = "LLaVA: " if row["group"] == "llava" else ""
    return prefix + name.replace("/", ": ").replace("_", " ")


def _plain(value: Mapping[str, float | None], group: str) -> str:
    digits = 4 if group == "alignment" else 1
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def _signed(value: Mapping[str, float | None], group: str) -> str:
    digits = 4 if group == "alignment" else 1
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:+.{digits}f}{spread}"
