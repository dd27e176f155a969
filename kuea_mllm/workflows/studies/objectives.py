"""`kuea-mllm world objectives`: which objective does what, on several worlds, with intervals.

Answers the paper's Table 1 in miniature (original, projection, feature, kernel), and the questions
that the mini world left open: a teacher that learnt without labels, a domain that the teacher never
saw, and how much to keep patch tokens in place. Settings are chosen on validation scans of world 0:
projection, feature and kernel from six candidates each by zero-shot accuracy, the weight of patch
preservation by what the mini LLaVA answers. The self-supervised teacher has candidates of its own,
the lacking domain takes the settings over. What is reported is measured once on test scans.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from kuea_mllm.errors import UserError
from kuea_mllm.io import atomic_directory, write_json, write_text
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import current_command, library_versions
from kuea_mllm.workflows.studies.trials import Trial, TrialPlace, run_trials

TUNING_WORLDS = (0,)
ZERO_SHOT = "zero_shot/average"
Settings = dict[str, Any]


def _grid(weights: Mapping[str, Sequence[float]], **fixed: Any) -> list[Settings]:
    [(key, values)] = weights.items()
    return [{**fixed, key: value, "optim.lr": lr} for value in values for lr in (3e-4, 1e-3)]


# Six candidates for each method, around values that were known to work from other worlds.
CANDIDATES: dict[str, list[Settings]] = {
    "projection": [{"ridge": value} for value in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)],
    "feature": _grid(
        {"objective.feature_weight": (0.5, 2.0, 8.0)}, **{"objective.kernel_weight": 0}
    ),
    "kernel": _grid({"objective.kernel_weight": (3000, 10000, 30000)}),
}
# Another teacher, other constants: `kuea-mllm calibrate` on world 0 finds rho = 0.0138, and its
# kernel matrix is further away, so that less weight does as much.
CANDIDATES_SSL: dict[str, list[Settings]] = {
    "projection": CANDIDATES["projection"],
    "kernel": _grid(
        {"objective.kernel_weight": (100, 1000, 10000)},
        **{
            "objective.student_kernel.gamma": 0.00609316,
            "objective.student_kernel.coef0": 0.442078,
        },
    ),
}
PATCH_WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)
SHOWN = (
    ZERO_SHOT,
    "zero_shot/single",
    "zero_shot/multi",
    "retrieval/i2t_r5",
    "retrieval/t2i_r5",
    "probe/digit",
    "probe/colour",
    "probe/position_r2",
    "probe/count",
)
BROAD_SETS = ("sketch", "gray", "invert", "noisy", "blur")


def run_objectives(
    out: Path, *, worlds: Path, seeds: Sequence[int], teacher: str, jobs: int, questions: int
) -> dict[str, Any]:
    """Choose settings on validation scans, measure on test scans, and write the record.

    What is finished is not repeated, so that an interrupted study goes on.

    Args:
        out: Folder of the study.
        worlds: Folder of built worlds `seed0`, `seed1`, ...; for the open questions also
            `teacher_ssl` and, in each world, `clip_broad`. What is missing is left out and said.
        seeds: Worlds to report on.
        teacher: Folder of the teacher, relative to `worlds`.
        jobs: Trials at once, each with one thread.
        questions: Questions for each task of the mini LLaVA.

    Returns:
        The content of `out/objectives.json`.
    """
    place = TrialPlace(out, worlds, questions=questions)
    best, tried = _tune(place, teacher, CANDIDATES, jobs)
    chosen: dict[str, Any] = {**best}
    tuning: dict[str, Any] = {**tried}
    chosen["keep_patches"], tuning["keep_patches"] = _tune_patches(
        place, teacher, chosen["kernel"], jobs
    )
    record: dict[str, Any] = {
        "schema_version": 1,
        "seeds": list(seeds),
        "chosen": chosen,
        "tuning": tuning,
        "parts": {},
        "versions": library_versions(),
        "command": current_command(),
    }
    parts = record["parts"]
    parts["table1"] = _measure(place, seeds, teacher, chosen, jobs, llava=True)
    if (worlds / "teacher_ssl").is_dir():
        part, tried = _tune(place, "teacher_ssl", CANDIDATES_SSL, jobs)
        tuning["self_supervised_teacher"] = tried
        chosen["self_supervised_teacher"] = part
        parts["self_supervised_teacher"] = _measure(place, seeds, "teacher_ssl", part, jobs)
    if all((worlds / f"seed{seed}" / "clip_broad").is_dir() for seed in seeds):
        part = {name: chosen[name] for name in ("projection", "kernel")}
        parts["domain_the_teacher_lacks"] = _measure(
            place, seeds, teacher, part, jobs, clip="clip_broad"
        )
    for name in ("self_supervised_teacher", "domain_the_teacher_lacks"):
        if name not in parts:
            LOGGER.warning("part %s is left out: its models are not in %s", name, worlds)
    write_json(out / "objectives.json", record)
    write_text(out / "objectives.md", objectives_markdown(record))
    return record


def build_extras(worlds: Path, *, seeds: Sequence[int]) -> None:
    """Train the models that the open questions need, where they are missing.

    Args:
        worlds: Folder of built worlds; gets `teacher`, `teacher_ssl`, `seed<n>/clip_broad`.
        seeds: Which worlds.

    Raises:
        UserError: If a world is missing.
    """
    from kuea_mllm.miniworld import ASSETS
    from kuea_mllm.miniworld.build import save_clip, save_teacher
    from kuea_mllm.miniworld.train_clip import train_clip
    from kuea_mllm.miniworld.train_teacher_ssl import train_ssl_teacher
    from kuea_mllm.miniworld.vocabularies import build_clip_tokenizer

    for seed in seeds:
        if not (worlds / f"seed{seed}" / "world.json").is_file():
            raise UserError(
                f"world {worlds / f'seed{seed}'} is missing or incomplete.",
                f"Build it: kuea-mllm world build --seed {seed} --out {worlds / f'seed{seed}'}",
            )
    if not (worlds / "teacher").exists():
        with atomic_directory(worlds / "teacher") as partial:
            shutil.copytree(ASSETS / "teacher", partial, dirs_exist_ok=True)
    if not (worlds / "teacher_ssl").exists():
        with atomic_directory(worlds / "teacher_ssl") as partial:
            save_teacher(train_ssl_teacher(), partial)
    for seed in seeds:
        folder = worlds / f"seed{seed}" / "clip_broad"
        if not folder.exists():
            with atomic_directory(folder) as partial:
                save_clip(train_clip(build_clip_tokenizer(), seed=seed, is_broad=True), partial)


def interval(changes: Sequence[float]) -> dict[str, Any]:
    """Return mean and 95 % interval (Student's t over worlds) of paired changes."""
    values = np.asarray(changes, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "per_seed": values.tolist()}
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "per_seed": values.tolist()}


def objectives_markdown(record: Mapping[str, Any]) -> str:
    """Return the tables of a study as Markdown."""
    lines = [f"Worlds {', '.join(map(str, record['seeds']))}; changes against the original tower,"]
    lines += ["paired within a world, with 95 % intervals (t) over worlds.", ""]
    for part, content in record["parts"].items():
        methods = list(content["changes"])
        lines += [f"## {part.replace('_', ' ')}", ""]
        lines += [f"| measurement | original | {' | '.join(methods)} |"]
        lines += ["|---|---:|" + "---:|" * len(methods)]
        for name in content["original"]:
            cells = [_cell(content["changes"][method].get(name)) for method in methods]
            original = np.mean(content["original"][name])
            lines.append(f"| {_readable(name)} | {original:.1f} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _tune(
    place: TrialPlace, teacher: str, candidates: Mapping[str, Sequence[Settings]], jobs: int
) -> tuple[dict[str, Settings], dict[str, list[dict[str, Any]]]]:
    trials = [
        Trial(method, world, settings, teacher=teacher)
        for method, listed in candidates.items()
        for settings in listed
        for world in TUNING_WORLDS
    ]
    results = run_trials(place, trials, jobs=jobs)
    scores: dict[str, list[dict[str, Any]]] = {}
    for trial, result in zip(trials, results, strict=True):
        rows = scores.setdefault(trial.method, [])
        if not rows or rows[-1]["settings"] != trial.settings:
            rows.append({"settings": dict(trial.settings), "validation": []})
        rows[-1]["validation"].append(result["encoder"][ZERO_SHOT])
    return {method: _best(rows) for method, rows in scores.items()}, scores


def _tune_patches(
    place: TrialPlace, teacher: str, kernel: Settings, jobs: int
) -> tuple[Settings, list[dict[str, Any]]]:
    """Choose how much to keep patch tokens by what the mini LLaVA answers on validation scans."""
    candidates = [{**kernel, "objective.patch_preserve_weight": w} for w in PATCH_WEIGHTS]
    world = TUNING_WORLDS[0]
    trials = [
        Trial("keep_patches", world, settings, teacher=teacher, scores=("encoder", "llava"))
        for settings in candidates
    ]
    rows = [
        {
            "settings": settings,
            "validation": [result["llava"]["average"]],
            "zero_shot": result["encoder"][ZERO_SHOT],
            "patch_drift": result["alignment"]["after"]["heldout_patch_drift"],
        }
        for settings, result in zip(candidates, run_trials(place, trials, jobs=jobs), strict=True)
    ]
    return _best(rows), rows


def _best(rows: Sequence[Mapping[str, Any]]) -> Settings:
    settings: Settings = max(rows, key=lambda row: float(np.mean(row["validation"])))["settings"]
    return settings


def _measure(
    place: TrialPlace,
    seeds: Sequence[int],
    teacher: str,
    methods: Mapping[str, Settings],
    jobs: int,
    *,
    clip: str = "clip",
    llava: bool = False,
) -> dict[str, Any]:
    """Return what the original scores and how every method changes it, on test scans."""
    trials = {
        (method, seed): Trial(
            method,
            seed,
            methods.get(method, {}),
            clip=clip,
            teacher=teacher,
            split="test",
            scores=_scores(method, llava),
        )
        for method in ("original", *methods)
        for seed in seeds
    }
    results = dict(zip(trials, run_trials(place, list(trials.values()), jobs=jobs), strict=True))
    values = {key: _values(result) for key, result in results.items()}
    names = list(values[("original", seeds[0])])
    changes = {
        method: {
            name: interval(
                [values[(method, seed)][name] - values[("original", seed)][name] for seed in seeds]
            )
            for name in names
            if name in values[(method, seeds[0])]
        }
        for method in methods
    }
    return {
        "teacher": teacher,
        "clip": clip,
        "original": {name: [values[("original", s)][name] for s in seeds] for name in names},
        "changes": changes,
    }


def _scores(method: str, llava: bool) -> tuple[str, ...]:
    # A projected teacher has no patch tokens of CLIP's, so there is nothing to swap into LLaVA.
    return ("encoder", "llava") if llava and method != "projection" else ("encoder",)


def _values(result: Mapping[str, Any]) -> dict[str, float]:
    encoder = result["encoder"]
    values = {name: encoder[name] for name in SHOWN}
    values["zero_shot/trained_styles"] = float(
        np.mean([encoder[f"zero_shot/{name}"] for name in ("single", "tiny", "large", "shift")])
    )
    values["zero_shot/other_styles"] = float(
        np.mean([encoder[f"zero_shot/{name}"] for name in BROAD_SETS])
    )
    for name, score in result.get("llava", {}).items():
        values[f"llava/{name.removeprefix('miniworld_')}"] = score
    return values


def _cell(change: Mapping[str, Any] | None) -> str:
    if change is None:
        return ""
    if change["low"] is None:
        return f"{change['mean']:+.1f}"
    return f"{change['mean']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]"


def _readable(name: str) -> str:
    return name.replace("/", ": ").replace("_", " ")
