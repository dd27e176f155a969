"""`kuea-mllm sweep`: the same alignment at many settings, in one table."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.config.sweep import SweepRecipe, name_run
from kuea_mllm.errors import OutputError, RecipeError, TrainingDiverged
from kuea_mllm.io import read_json, write_json, write_text
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import current_command, library_versions

MEASURED = (
    "heldout_kernel_gap",
    "heldout_kernel_gap_original",
    "heldout_cka_teacher",
    "heldout_drift_cosine_mean",
    "heldout_drift_bound_mean",
    "heldout_patch_drift",
    "heldout_zero_shot",
)


@dataclass(frozen=True)
class SweepRun:
    """One combination: its name, the keys it changes, and the whole recipe."""

    name: str
    changes: dict[str, Any]
    recipe: AlignRecipe


def plan_sweep(
    sweep: SweepRecipe, out: Path, *, settings: Mapping[str, Any], overrides: Sequence[str] = ()
) -> list[SweepRun]:
    """Return all runs, validated before any of them starts.

    Runs share one target cache below `out` unless the recipe names another, because teacher and
    original embeddings do not depend on anything that such a sweep varies. It is left out where it
    is impossible: with a random transform or a stream.

    Args:
        sweep: What is varied.
        out: Folder of the sweep.
        settings: Keys of every run, by dotted path; they win over those of the sweep.
        overrides: `key=value` texts for every run.

    Raises:
        RecipeError: If a combination is no valid recipe (names it), or two have one name.
    """
    runs = []
    for changes in sweep.combinations():
        name = name_run(changes)
        # steps and epochs exclude each other; who varies one means it.
        lengths = {"optim.steps": "optim.epochs", "optim.epochs": "optim.steps"}
        cleared = {other: None for key, other in lengths.items() if key in changes}
        keys = {**sweep.settings, **settings, **cleared, **changes}
        try:
            recipe = load_recipe(sweep.recipe, AlignRecipe, settings=keys, overrides=overrides)
            recipe = load_recipe(
                sweep.recipe,
                AlignRecipe,
                settings={**keys, **_shared_cache(recipe, out)},
                overrides=overrides,
            )
        except RecipeError as error:
            raise RecipeError(f"run {name}: {error.problem}", error.remedy) from None
        runs.append(SweepRun(name, changes, recipe))
    if len({run.name for run in runs}) < len(runs):
        raise RecipeError(
            "two combinations of the grid have one name.", "Remove the repeated value."
        )
    return runs


def run_sweep(
    runs: Sequence[SweepRun], out: Path, *, sweep: SweepRecipe, progress: bool
) -> dict[str, Any]:
    """Run what is missing, one after the other, and write the table.

    Finished runs are read, an interrupted one is resumed. A run that diverges is a result: it is
    recorded in the table, not repeated, and the sweep goes on.

    Returns:
        The content of `out/sweep.json`.

    Raises:
        OutputError: If `out` holds another sweep, or something else.
    """
    _open(out, runs)
    known = read_json(out / "sweep.json")["runs"] if (out / "sweep.json").exists() else []
    failed = {row["name"]: row for row in known if row["error"] is not None}
    rows = []
    for number, run in enumerate(runs, start=1):
        LOGGER.info("run %d of %d: %s", number, len(runs), run.name)
        result = failed.get(run.name) or _result(run, out, progress)
        rows.append({**result, "name": run.name, "changes": run.changes})
        record = {
            "schema_version": 1,
            "recipe": sweep.recipe,
            "grid": sweep.grid,
            "complete": number == len(runs),
            "runs": rows,
            "versions": library_versions(),
            "command": current_command(),
        }
        # After every run, so that a look at the table need not wait for the last one.
        write_json(out / "sweep.json", record)
        write_text(out / "sweep.md", sweep_markdown(record))
    return record


def sweep_markdown(record: Mapping[str, Any]) -> str:
    """Return the table of a sweep as Markdown."""
    shown = [name for name in MEASURED if any(name in row["after"] for row in record["runs"])]
    header = ["run", *(name.removeprefix("heldout_").replace("_", " ") for name in shown)]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * len(shown)]
    for row in record["runs"]:
        if row["error"] is not None:
            problem = row["error"].splitlines()[0].replace("|", "\\|")
            lines.append(f"| {row['name']} | {problem} |" + " |" * (len(shown) - 1))
            continue
        cells = [f"{row['after'][name]:.4g}" if name in row["after"] else "" for name in shown]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _result(run: SweepRun, out: Path, progress: bool) -> dict[str, Any]:
    from kuea_mllm.alignment.run import run_alignment
    from kuea_mllm.reporting.alignment import draw_alignment_figures

    directory = out / "runs" / run.name
    if not directory.exists():
        is_begun = directory.with_name(f"{run.name}.unfinished").exists()
        try:
            run_alignment(
                run.recipe,
                directory,
                progress=progress,
                finish=draw_alignment_figures,
                resume=is_begun,
            )
        except TrainingDiverged as error:
            LOGGER.warning("run %s failed: %s", run.name, error)
            return {"before": {}, "after": {}, "error": str(error)}
        finally:
            # A trainer is a reference cycle, which would keep its tower and optimiser on the device
            # beside those of the next run.
            gc.collect()
    manifest = read_json(directory / "tower" / "kuea.json")
    measured = manifest["heldout"]
    return {"before": measured["before"], "after": measured["after"], "error": None}


def _shared_cache(recipe: AlignRecipe, out: Path) -> dict[str, Any]:
    if recipe.data.augment != "none" or recipe.data.stream:
        return {}
    return {
        "targets.cache": True,
        "targets.directory": recipe.targets.directory or str(out / "targets"),
    }


def _open(out: Path, runs: Sequence[SweepRun]) -> None:
    record = out / "plan.json"
    wanted = {run.name: run.recipe.model_dump(mode="json") for run in runs}
    if not out.exists():
        (out / "runs").mkdir(parents=True)
        write_json(record, wanted)
        return
    if not record.exists():
        raise OutputError(f"output {out} exists and holds no sweep.", "Choose another --out.")
    found = read_json(record)
    for name, recipe in wanted.items():
        if name in found and found[name] != recipe:
            raise OutputError(
                f"output {out} holds a sweep whose run {name} has another recipe.",
                "Choose another --out, or repeat the options of plan.json.",
            )
    # A longer list of values goes on with what is there.
    write_json(record, {**found, **wanted})
