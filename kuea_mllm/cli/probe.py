"""`kuea-mllm probe`: what a vision tower can do by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.common import (
    Activation,
    DryRun,
    Heads,
    Json,
    Out,
    Restart,
    Resume,
    SetOption,
    print_json,
    verb,
)

if TYPE_CHECKING:
    from kuea_mllm.config.probe import ProbeRecipe
    from kuea_mllm.workflows.probe import Probing

_ALL = "all"


@verb
def probe(
    tower: Annotated[
        str,
        typer.Argument(
            metavar="TOWER",
            help="A tower: directory, checkpoint file or Hub id; or the directory of a projection.",
            show_default=False,
        ),
    ],
    out: Out,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="TOWER", help="Another tower: score it too, and compare TOWER with it."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="zero-shot, retrieval, linear, patch, mmvp-vlm; several with commas, or all."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file of one suite.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with a sub-folder for each data set; the Hub if left out."),
    ] = None,
    datasets: Annotated[
        str | None, typer.Option(help="Comma-separated: only these data sets, such as CIFAR10,DTD.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="CLIP whose text tower is used; found from the tower's record."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Of a projection: where its teacher lies, if not where it was."),
    ] = None,
    compat: Annotated[
        str | None,
        typer.Option(help="correct, or released: with the faults of the released evaluation."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images that are embedded at once.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only N images of each data set, spread evenly over it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the probes that are trained.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode images; up to 8 if left out.")
    ] = None,
    activation: Activation = None,
    heads: Heads = None,
    overrides: SetOption = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    restart: Restart = False,
    json_output: Json = False,
) -> None:
    """Score a vision tower by itself: zero-shot, retrieval, linear and patch probes, MMVP-VLM.

    The tower is paired with the frozen text tower of the CLIP that it was made from. Embeddings are
    computed once and kept, for all suites. Writes OUT/summary.json, OUT/samples/*.jsonl and
    OUT/report.html; with --against both results, comparison.json and report.html.
    """
    shorthands: dict[str, object] = {
        "compat": compat,
        "batch_size": batch_size,
        "limit": limit,
        "dtype": dtype,
        "device": device,
        "seed": seed,
    }
    settings = {key: value for key, value in shorthands.items() if value is not None}
    recipes = _load(suite, recipe, settings, overrides or [])

    from kuea_mllm.devices import choose_device
    from kuea_mllm.manifest import current_command
    from kuea_mllm.workflows.probe import Probing
    from kuea_mllm.workflows.probe import probe as run_probe
    from kuea_mllm.workflows.probe_suites import ProbePlace, plan_jobs

    place = ProbePlace(
        data,
        device=choose_device(recipes[0].device),
        progress=not json_output,
        workers=workers,
    )
    how = Probing(
        plan_jobs(recipes, _names(datasets)),
        place,
        base=base,
        activation=activation,
        heads=heads,
        teacher=teacher,
        command=current_command(),
    )
    if dry_run:
        _print_plan(how, [t for t in (tower, against) if t], json_output=json_output)
    elif against is None:
        summary = run_probe(tower, how, out, resume=resume, restart=restart)
        if json_output:
            print_json(summary)
            return
        from kuea_mllm.reporting.tables import print_summary

        print_summary(summary)
        for line in _averages(recipes, summary):
            typer.echo(line)
        typer.echo(f"results: {out}")
    else:
        _run_pair(tower, against, how, out, (resume, restart), json_output=json_output)


def _run_pair(
    tower: str,
    against: str,
    how: Probing,
    out: Path,
    ways: tuple[bool, bool],
    *,
    json_output: bool,
) -> None:
    from kuea_mllm.reporting.tables import print_comparison
    from kuea_mllm.workflows.against import REPORT
    from kuea_mllm.workflows.probe import probe_pair

    comparison = probe_pair(tower, against, how, out, resume=ways[0], restart=ways[1])
    if json_output:
        print_json(comparison)
        return
    print_comparison(comparison)
    typer.echo(f"report: {out / REPORT}")


def _averages(recipes: Sequence[ProbeRecipe], summary: Mapping[str, Any]) -> list[str]:
    """Return a line for each average of the recipes whose data sets were all scored."""
    entries = list(summary["columns"].values())
    lines = []
    for recipe in recipes:
        for name, covered in recipe.averages.items():
            scores = [
                entry["score"]
                for entry in entries
                if entry["column"] in covered and entry["suite"] == f"probe-{recipe.suite}"
            ]
            if len(scores) == len(covered):
                mean = 100 * sum(scores) / len(scores)
                lines.append(f"{name}, mean of {len(scores)}: {mean:.2f}")
    return lines


def _load(
    suite: str | None, recipe: str | None, settings: Mapping[str, object], overrides: list[str]
) -> list[ProbeRecipe]:
    from kuea_mllm.config.probe import SUITES, ProbeRecipe
    from kuea_mllm.config.recipes import load_recipe
    from kuea_mllm.errors import RecipeError

    if recipe is not None:
        loaded = load_recipe(recipe, ProbeRecipe, settings=settings, overrides=overrides)
        if suite not in (None, loaded.suite):
            raise RecipeError(
                f"recipe {recipe} is of suite {loaded.suite}, not {suite}.", "Leave out --suite."
            )
        return [loaded]
    names = list(SUITES) if suite == _ALL else _names(suite)
    if not names:
        raise RecipeError("nothing to probe.", f"Give --suite: {', '.join(SUITES)} or all.")
    for name in names:
        if name not in SUITES:
            raise RecipeError(
                f"no suite is called {name!r}.", f"Known: {', '.join(SUITES)} and all."
            )
    return [
        load_recipe(
            f"probe/{name.replace('-', '_')}",
            ProbeRecipe,
            settings=settings,
            overrides=[text for text in overrides if _is_for(text, name, names)],
        )
        for name in dict.fromkeys(names)
    ]


def _is_for(override: str, suite: str, suites: Sequence[str]) -> bool:
    """Tell whether a suite gets an override: a section goes to its own one, if that is asked for.

    Without it every suite gets the override, and its recipe says what is wrong.
    """
    section = override.split("=", 1)[0].split(".", 1)[0].strip()
    return section not in suites or section == suite


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _print_plan(how: Probing, towers: Sequence[str], *, json_output: bool) -> None:
    """Open towers and data sets, and print what would be scored; nothing is embedded.

    Raises:
        UserError: If something is missing or incomplete; what was planned is printed before.
    """
    from kuea_mllm.probing.datasets.open import locate
    from kuea_mllm.workflows.probe_suites import open_all, require_data

    entries = []
    for job in how.jobs:
        found = None if how.place.data is None else locate(job.data, how.place.data)
        entries.append(
            {
                "suite": job.recipe.suite,
                "name": job.data.name,
                "metric": job.data.metric,
                "documents": job.data.documents,
                "folder": None if found is None else str(found),
                "source": job.data.source,
                "faults": job.faults,
            }
        )
    if json_output:
        print_json({"towers": list(towers), "device": how.place.device, "datasets": entries})
    else:
        for job, entry in zip(how.jobs, entries, strict=True):
            where = entry["folder"] or ("the Hub" if how.place.data is None else "missing")
            faults = f", faults: {', '.join(job.faults)}" if job.faults else ""
            typer.echo(
                f"{entry['suite']}: {entry['name']}, {entry['metric']}, "
                f"{job.data.documents:,} documents expected{faults}, {where}"
            )
    require_data(how.jobs, how.place.data)
    subjects = [how.open(tower) for tower in towers]
    open_all(how.jobs, subjects[0], how.place)
    if not json_output:
        what = "Towers" if how.place.data is None else "Towers and data sets"
        typer.echo(f"{what} can be opened.")
