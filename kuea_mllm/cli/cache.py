"""`kuea-mllm cache`: targets on disk, built ahead, verified, listed, removed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.common import Json, SetOption, print_json, verb

if TYPE_CHECKING:
    from kuea_mllm.alignment.target_inputs import TargetCache

app = typer.Typer(
    help="Keep the embeddings of frozen towers on disk.\n\n"
    "Caches lie in --dir, else targets.directory, else $KUEA_MLLM_CACHE, else $HF_HOME/kuea_mllm.",
    no_args_is_help=True,
)

Recipe = Annotated[str, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file.")]
Student = Annotated[str | None, typer.Option(help="Tower: HF directory, hub id or file.")]
Teacher = Annotated[str | None, typer.Option(help="Vision model: HF directory or hub id.")]
Images = Annotated[str | None, typer.Option(help="Training images.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")]
Directory = Annotated[Path | None, typer.Option("--dir", help="Folder of caches.")]

_MISMATCH = 1e-3


@app.command()
@verb
def build(
    recipe: Recipe = "align/vit_l_14",
    student: Student = None,
    teacher: Teacher = None,
    images: Images = None,
    device: Device = None,
    directory: Directory = None,
    overrides: SetOption = None,
    json_output: Json = False,
) -> None:
    """Compute the targets of a recipe ahead of `align`; goes on where it stopped.

    Several processes help each other: start it under torchrun, or several times.
    """
    cache = _open(recipe, student, teacher, images, device, directory, overrides)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    quiet = json_output or bool(os.environ.get("KUEA_MLLM_QUIET"))
    report = cache.build(progress=rank == 0 and not quiet, rank=rank, world_size=world_size)
    if rank != 0:
        return
    directories = {name: str(store.directory) for name, store in cache.stores.items()}
    if json_output:
        print_json(
            {
                "images": report.images,
                "computed": report.computed,
                "unreadable": [cache.dataset.source.name(p) for p in report.replaced],
                "seconds": round(report.seconds, 2),
                "images_per_second": round(report.images_per_second, 1),
                "stores": directories,
            }
        )
        return
    for name, store in cache.stores.items():
        typer.echo(f"{name}: {store.directory} ({store.description})")


@app.command()
@verb
def verify(
    recipe: Recipe = "align/vit_l_14",
    student: Student = None,
    teacher: Teacher = None,
    images: Images = None,
    device: Device = None,
    directory: Directory = None,
    count: Annotated[int, typer.Option(min=1, help="Rows to compute anew in each store.")] = 256,
    seed: Annotated[int, typer.Option(help="Which rows.")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest relative error of a row; default by precision.")
    ] = 0.0,
    overrides: SetOption = None,
    json_output: Json = False,
) -> None:
    """Compute a random sample of a recipe's cached targets anew and compare."""
    from kuea_mllm.errors import EnvironmentFailure

    cache = _open(recipe, student, teacher, images, device, directory, overrides)
    allowed = tolerance or (_MISMATCH if cache.precision == "fp32" else 0.02)
    results = cache.verify(count=count, seed=seed)
    if json_output:
        print_json(
            {
                name: {
                    "directory": str(cache.stores[name].directory),
                    "checked": result.checked,
                    "max_relative_error": result.max_relative_error,
                    "changed": list(result.changed),
                }
                for name, result in results.items()
            }
        )
    else:
        for name, result in results.items():
            typer.echo(
                f"{name}: {result.checked} rows checked, largest relative error "
                f"{result.max_relative_error:.1e}, {len(result.changed)} images changed"
            )
    for name, result in results.items():
        store = cache.stores[name]
        remedy = f"Remove it (kuea-mllm cache rm {store.key.digest}) and build it again."
        if result.changed:
            raise EnvironmentFailure(
                f"cache {store.directory}: {len(result.changed)} of {result.checked} images "
                f"changed since it was built, the first is {result.changed[0]}.",
                remedy,
            )
        # Written so that a NaN fails.
        if not result.max_relative_error <= allowed:
            raise EnvironmentFailure(
                f"cache {store.directory}: its rows differ by {result.max_relative_error:.1e} "
                f"from what {name} gives now, {allowed:.0e} is allowed.",
                remedy,
            )


@app.command("ls")
@verb
def list_caches(directory: Directory = None, json_output: Json = False) -> None:
    """List the caches."""
    from kuea_mllm.alignment.target_store import PREFIX, cache_root, list_stores

    root = cache_root(directory)
    rows: list[dict[str, Any]] = []
    for path, store, problem in list_stores(root):
        row: dict[str, Any] = {"cache": path.name.removeprefix(PREFIX), "problem": problem or None}
        if store is not None:
            row |= {
                "model": store.description,
                "width": store.key.width,
                "precision": store.key.precision,
                "images": store.key.population,
                "done": int(store.done.sum()),
                "bytes": store.disk_bytes(),
                "created": store.created,
            }
        rows.append(row)
    if json_output:
        print_json({"root": str(root), "caches": rows})
        return
    if not rows:
        typer.echo(f"no caches in {root}")
        return
    typer.echo(f"{'cache':<16}  {'images':>9}  {'done':>6}  {'size':>9}  {'numbers':>12}  model")
    for row in rows:
        if row["problem"]:
            typer.echo(f"{row['cache']:<16}  {row['problem']}")
            continue
        share = f"{100 * row['done'] / row['images']:.4g} %"
        numbers = f"{row['width']} {row['precision']}"
        typer.echo(
            f"{row['cache']:<16}  {row['images']:>9}  {share:>6}  {row['bytes'] / 1e6:>6.1f} MB  "
            f"{numbers:>12}  {row['model']}"
        )
    typer.echo(f"in {root}")


@app.command("rm")
@verb
def remove(
    caches: Annotated[
        list[str] | None, typer.Argument(help="Caches as `ls` names them.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All caches of the folder.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    directory: Directory = None,
) -> None:
    """Remove caches; they are built again when they are needed."""
    from kuea_mllm.alignment.target_store import PREFIX, cache_root, remove_store
    from kuea_mllm.errors import UserError

    root = cache_root(directory)
    present = sorted(path.name.removeprefix(PREFIX) for path in root.glob(f"{PREFIX}*"))
    if everything == bool(caches):
        raise UserError("name the caches to remove, or give --all.", "See `kuea-mllm cache ls`.")
    chosen = present if everything else [name.removeprefix(PREFIX) for name in caches or []]
    for name in chosen:
        if name not in present:
            raise UserError(f"there is no cache '{name}' in {root}.", "See `kuea-mllm cache ls`.")
    for name in chosen:
        if not yes and not typer.confirm(f"Remove cache {name}?"):
            continue
        remove_store(root / f"{PREFIX}{name}")
        typer.echo(f"removed {name}")


def _open(
    recipe: str,
    student: str | None,
    teacher: str | None,
    images: str | None,
    device: str | None,
    directory: Path | None,
    overrides: list[str] | None,
) -> TargetCache:
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe

    shorthands = {
        "student.model": student,
        "teacher.model": teacher,
        "data.images": images,
        "runtime.device": device,
        "targets.directory": None if directory is None else str(directory),
    }
    settings = {key: value for key, value in shorthands.items() if value is not None}
    # Set, so that a recipe that cannot be cached is refused by its schema.
    loaded = load_recipe(
        recipe,
        AlignRecipe,
        settings={**settings, "targets.cache": True},
        overrides=overrides or [],
    )
    from kuea_mllm.alignment.inputs import open_inputs
    from kuea_mllm.alignment.target_inputs import open_target_cache

    return open_target_cache(open_inputs(loaded))
