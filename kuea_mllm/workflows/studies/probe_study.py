"""`kuea-mllm world probe`: the encoder tables in miniature, over several worlds.

Original tower, kernel alignment, feature alignment, kernel alignment without preservation, and the
projection of the teacher, all through the code of `kuea-mllm probe`, compared by that of `compare`.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuea_mllm import __version__
from kuea_mllm.config.probe import ProbeRecipe
from kuea_mllm.config.recipes import find_recipe
from kuea_mllm.io import atomic_directory, read_json, write_json, write_text
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import current_command, library_versions
from kuea_mllm.workflows.studies.worlds import (
    HELDOUT_IMAGES,
    TRAIN_IMAGES,
    find_world,
    is_measured,
    obtain_world,
    open_study,
    run_seeds,
    world_identity,
)

ORIGINAL, PROJECTION = "original", "projection"
# Settings were chosen on validation scans of world 0 (docs/data/objectives.json).
ALIGNED: dict[str, dict[str, object]] = {
    "kernel": {"optim.lr": 1e-3},
    "feature": {
        "objective.kernel_weight": 0,
        "objective.feature_weight": 0.5,
        "optim.lr": 1e-3,
    },
    "no_preservation": {"objective.preserve_weight": 0, "optim.lr": 1e-3},
}
TOWERS = (ORIGINAL, *ALIGNED, PROJECTION)


@dataclass(frozen=True)
class ProbeStudySettings:
    """What makes two studies comparable; a study resumes only under equal settings.

    Attributes:
        split: Scans in the pictures that are scored.
        per_set: Pictures in each set that is scored.
        probe_train: Pictures that each probe is trained on.
        patch_epochs: Passes over them of the patch probes.
        train_images: Pictures to align on.
        align_steps: Updates of an alignment; None takes the recipe's.
        towers: What is scored.
        recipe: Checksum of the recipe `align/miniworld`.
        version: Of this package.
    """

    split: str
    per_set: int
    probe_train: int
    patch_epochs: int = 20
    train_images: int = TRAIN_IMAGES
    align_steps: int | None = None
    towers: tuple[str, ...] = TOWERS
    recipe: str = ""
    version: str = __version__


def run_probe_study(
    out: Path,
    *,
    seeds: int,
    worlds: Path | None,
    split: str = "test",
    per_set: int = 1000,
    probe_train: int = 3000,
    patch_epochs: int = 20,
    train_images: int = TRAIN_IMAGES,
    align_steps: int | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Make the five image encoders of each world, probe them all, and write tables and report.

    A study that was interrupted goes on where it stopped: worlds that are finished are read, not
    repeated.

    Args:
        out: Directory of the study.
        seeds: Number of worlds, seeds 0 to seeds - 1.
        worlds: Built worlds `seed0`, `seed1`, ... to use; None builds them in `out`.
        split: Scans in the pictures that are scored.
        per_set: Pictures in each set that is scored.
        probe_train: Pictures that each probe is trained on.
        patch_epochs: Passes over them of the patch probes.
        train_images: Pictures to align on.
        align_steps: Updates of an alignment; None takes the recipe's.
        jobs: Worlds in work at once, each in a process of its own.

    Returns:
        The content of `out/probe_table.json`.

    Raises:
        OutputError: If `out` holds a study with other settings.
    """
    recipe = find_recipe("align/miniworld").text
    settings = ProbeStudySettings(
        split,
        per_set,
        probe_train,
        patch_epochs,
        train_images,
        align_steps,
        recipe=hashlib.sha256(recipe.encode()).hexdigest(),
    )
    given = {seed: find_world(worlds, seed) for seed in range(seeds)}
    open_study(out, asdict(settings))
    _write_inputs(out, settings)
    todo = [seed for seed in range(seeds) if not is_measured(out, seed, given[seed])]
    LOGGER.info("%d of %d seeds to do, %d at once", len(todo), seeds, jobs)
    run_seeds(functools.partial(_study_seed, out, given, settings), todo, jobs=jobs)
    return _write_record(out, seeds, settings)


def miniworld_recipes(settings: ProbeStudySettings) -> list[ProbeRecipe]:
    """Return the suites on the data sets that `miniworld.probe_sets` writes."""
    from kuea_mllm.miniworld.probe_sets import CAPTIONED, LABELLED, LABELS, PAIRS, STYLES

    count = settings.per_set
    shared: dict[str, Any] = {"kind": "probe", "batch_size": 500}
    local: dict[str, Any] = {"source": "the mini world", "documents": count}
    trained = {**local, "train_split": "train", "train_documents": settings.probe_train}
    contents: list[dict[str, Any]] = [
        {
            "suite": "zero-shot",
            "datasets": [
                {**local, "name": name, "key": name, "layout": "folder", "metric": "acc1"}
                for name in STYLES
            ],
            "averages": {"Average zero-shot": list(STYLES)},
        },
        {
            "suite": "retrieval",
            "datasets": [
                {
                    **local,
                    "name": "pictures",
                    "key": CAPTIONED,
                    "layout": "karpathy",
                    "metric": "recall@k",
                }
            ],
        },
        {
            "suite": "linear",
            "datasets": [
                {
                    **trained,
                    "name": name,
                    "key": f"linear_{name}",
                    "layout": "folder",
                    "metric": "lp_acc1",
                }
                for name in LABELS
            ],
            "linear": {},
        },
        {
            "suite": "patch",
            "datasets": [
                {
                    **trained,
                    "name": "cells",
                    "key": LABELLED,
                    "layout": "coco-stuff",
                    "split": "val",
                    "metric": "macro_recall",
                }
            ],
            # Fewer steps than the 18,500 of COCO, so fewer to warm up.
            "patch": {"warmup_steps": 50, "epochs": settings.patch_epochs},
        },
        {
            "suite": "mmvp-vlm",
            "datasets": [
                {
                    **local,
                    "documents": 3 * max(1, count // 10),
                    "name": "pairs",
                    "key": PAIRS,
                    "layout": "mmvp-vlm",
                    "metric": "pair_accuracy",
                }
            ],
        },
    ]
    return [
        ProbeRecipe.parse({**shared, **content}, origin=f"of the mini world ({content['suite']})")
        for content in contents
    ]


def _write_inputs(out: Path, settings: ProbeStudySettings) -> None:
    from kuea_mllm.miniworld.images import write_images
    from kuea_mllm.miniworld.probe_sets import write_probe_sets

    # The same pictures for every seed: spread then comes from models, not data.
    if not (out / "images").exists():
        write_images(out / "images", split="train", count=settings.train_images, seed=0)
    if not (out / "heldout").exists():
        write_images(out / "heldout", split=settings.split, count=HELDOUT_IMAGES, seed=1)
    if not (out / "data").exists():
        write_probe_sets(
            out / "data",
            split=settings.split,
            per_set=settings.per_set,
            train=settings.probe_train,
        )


def _study_seed(
    out: Path, given: Mapping[int, Path | None], settings: ProbeStudySettings, seed: int
) -> None:
    # Heavy imports belong to the process that does the work.
    from kuea_mllm.workflows.probe import Probing, probe
    from kuea_mllm.workflows.probe_suites import ProbePlace, plan_jobs

    world = obtain_world(out, seed, given[seed])
    started = time.perf_counter()
    with atomic_directory(out / f"seed{seed}") as folder:
        encoders = _make_encoders(out, world, folder, settings, seed)
        place = ProbePlace(out / "data", workers=0, cache=out / "cache")
        jobs = plan_jobs(miniworld_recipes(settings))
        scores, seconds = {}, {}
        for name, reference in encoders.items():
            # A projection has no patch tokens.
            own = [job for job in jobs if name != PROJECTION or job.recipe.suite != "patch"]
            how = Probing(own, place, command=current_command(), thumbnails=50)
            summary = probe(str(reference), how, folder / "results" / name)
            seconds[f"probe {name}"] = summary["seconds"]
            scores[name] = {
                entry["column"]: 100 * entry["score"] for entry in summary["columns"].values()
            }
        result = {
            "seed": seed,
            "world": world_identity(world),
            "scores": scores,
            "seconds": {**seconds, "all": round(time.perf_counter() - started, 1)},
        }
        write_json(folder / "result.json", result)
    LOGGER.info("seed %d: %s", seed, scores)


def _make_encoders(
    out: Path, world: Path, folder: Path, settings: ProbeStudySettings, seed: int
) -> dict[str, Path]:
    """Align the CLIP of a world in every way, and return where the results lie."""
    from kuea_mllm.alignment.projection_run import run_projection
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe
    from kuea_mllm.workflows.studies.steps import align_miniworld

    steps = {} if settings.align_steps is None else {"optim.steps": settings.align_steps}
    if settings.align_steps is not None:
        steps["optim.warmup_steps"] = settings.align_steps // 10
    encoders = {ORIGINAL: world / "clip"}
    for name, changes in ALIGNED.items():
        aligned = align_miniworld(
            world,
            out / "images",
            out / "heldout",
            folder / "align" / name,
            settings={"runtime.seed": seed, **changes, **steps},
            show_progress=False,
        )
        encoders[name] = aligned.tower
    recipe = load_recipe(
        "align/miniworld",
        AlignRecipe,
        settings={
            "method": "projection",
            "student.model": str(world / "clip"),
            "teacher.model": str(world / "teacher"),
            "data.images": str(out / "images"),
            "data.heldout": str(out / "heldout"),
            "runtime.device": "cpu",
        },
    )
    run_projection(recipe, folder / "align" / PROJECTION, progress=False)
    encoders[PROJECTION] = folder / "align" / PROJECTION
    return encoders


def _write_record(out: Path, seeds: int, settings: ProbeStudySettings) -> dict[str, Any]:
    from kuea_mllm.evaluation.comparing.compare import Comparison, compare_systems, comparisons_json
    from kuea_mllm.evaluation.comparing.systems import System
    from kuea_mllm.evaluation.results import load_results
    from kuea_mllm.reporting.comparison import write_comparison_report
    from kuea_mllm.reporting.probe_study import probe_study_markdown

    folders = [out / f"seed{seed}" / "results" for seed in range(seeds)]
    systems = [
        System(name, tuple(load_results(folder / name) for folder in folders)) for name in TOWERS
    ]
    found: Sequence[Comparison] = compare_systems(systems, common_only=True)
    record: dict[str, Any] = {
        "schema_version": 1,
        "settings": asdict(settings),
        "seeds": list(range(seeds)),
        "scores": _mean_scores(folders),
        "differences": {
            str(comparison.candidate.label): _plain_differences(comparison.to_json())
            for comparison in found
        },
        "per_seed": [read_json(out / f"seed{seed}" / "result.json") for seed in range(seeds)],
        "versions": library_versions(),
        "command": current_command(),
    }
    write_json(out / "probe_table.json", record)
    write_text(out / "probe_table.md", probe_study_markdown(record))
    (out / "report.html").unlink(missing_ok=True)
    write_comparison_report(
        out / "report.html",
        comparison=comparisons_json(found),
        provenance=[*library_versions().items(), ("command", record["command"])],
    )
    return record


def _mean_scores(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return tower -> column -> mean over worlds in percent, and each."""
    scores: dict[str, dict[str, Any]] = {}
    for name in TOWERS:
        summaries = [read_json(folder / name / "summary.json") for folder in folders]
        for task, entry in summaries[0]["columns"].items():
            values = [100 * summary["columns"][task]["score"] for summary in summaries]
            row = {"mean": sum(values) / len(values), "per_seed": values, "suite": entry["suite"]}
            scores.setdefault(name, {})[entry["column"]] = row
    return scores


_KEPT = (
    *("suite", "metric", "baseline", "candidate", "difference", "low", "high", "p_value"),
    *("p_holm", "verdict", "detectable", "n", "clusters", "seeds"),
)


def _plain_differences(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what a table needs, without names of files and lists of pictures."""
    columns = {
        entry["column"]: {key: entry[key] for key in _KEPT}
        for entry in comparison["columns"].values()
    }
    averages = {
        name: {key: average[key] for key in _KEPT if key in average}
        for name, average in comparison["averages"].items()
    }
    return {"columns": columns, "averages": averages}
