"""`kuea-mllm cache`: targets on disk, built ahead, verified, listed, removed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.common import Json, SetOption, print_json, verb

if TYPE_CHECKING:
    from kuea_mllm.alignment.target_inputs import TargetCache
    from kuea_mllm.workflows.caches import Kept

app = typer.Typer(
    help="Build, list and remove what is kept because it takes long to compute.\n\n"
    "Caches lie in --dir, else targets.directory, else $KUEA_MLLM_CACHE, else $HF_HOME/kuea_mllm.",
    no_args_is_help=True,
)

Recipe = Annotated[str, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file.")]
Student = Annotated[str | None, typer.Option(help="Tower: HF directory, hub id or file.")]
Teacher = Annotated[str | None, typer.Option(help="Vision model: HF directory or hub id.")]
Images = Annotated[str | None, typer.Option(help="Training images.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")]
Directory = Annotated[Path | None, typer.Option("--dir", help="Folder of caches.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_MISMATCH = 1e-3
_DAY = 86400.0
_HEADING = f"{'cache':<16}  {'kind':<14}  {'holds':>15}  {'done':>7}  {'size':>8}  used"


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
    """List what is kept: targets, features of probes, mixtures, indexes of shards and more."""
    from kuea_mllm.alignment.target_store import cache_root
    from kuea_mllm.workflows.caches import list_kept

    root = cache_root(directory)
    found = list_kept(root)
    if json_output:
        print_json({"root": str(root), "caches": [_as_json(each) for each in found]})
        return
    if not found:
        typer.echo(f"no caches in {root}")
        return
    typer.echo(_HEADING)
    for each in found:
        for line in _lines(each):
            typer.echo(line)
    typer.echo(f"{_size(sum(each.bytes for each in found))} in {root}")


@app.command("rm")
@verb
def remove(
    caches: Annotated[
        list[str] | None, typer.Argument(help="Caches as `ls` names them.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All caches of the folder.")] = False,
    yes: Yes = False,
    directory: Directory = None,
) -> None:
    """Remove caches; they are built again when they are needed."""
    from kuea_mllm.alignment.target_store import cache_root
    from kuea_mllm.errors import UserError
    from kuea_mllm.workflows.caches import list_kept

    root = cache_root(directory)
    if everything == bool(caches):
        raise UserError("name the caches to remove, or give --all.", "See `kuea-mllm cache ls`.")
    present = {each.name: each for each in list_kept(root)}
    chosen = list(present) if everything else [_plain(name) for name in caches or []]
    for name in chosen:
        if name not in present:
            raise UserError(f"there is no cache '{name}' in {root}.", "See `kuea-mllm cache ls`.")
    _remove([present[name] for name in dict.fromkeys(chosen)], yes=yes)


@app.command()
@verb
def prune(
    unused: Annotated[
        float, typer.Option("--unused-days", min=0, help="Not read or written for so long.")
    ] = 30.0,
    yes: Yes = False,
    directory: Directory = None,
) -> None:
    """Remove what was not used for some time, and what is damaged."""
    from kuea_mllm.alignment.target_store import cache_root
    from kuea_mllm.workflows.caches import list_kept

    root = cache_root(directory)
    limit = time.time() - unused * _DAY
    old = [each for each in list_kept(root) if each.problem or each.used <= limit]
    if not old:
        typer.echo(f"nothing in {root} is damaged or was unused for {unused:g} days")
        return
    if not yes:
        typer.echo(_HEADING)
        for each in old:
            for line in _lines(each):
                typer.echo(line)
        size = _size(sum(each.bytes for each in old))
        if not typer.confirm(f"Remove these {len(old)} ({size})?"):
            return
    _remove(old, yes=True)


def _remove(chosen: Sequence[Kept], *, yes: bool) -> None:
    for each in chosen:
        what = f"{each.name} ({each.kind}, {_size(each.bytes)})"
        if yes or typer.confirm(f"Remove cache {what}?"):
            each.remove()
            typer.echo(f"removed {what}")


def _lines(kept: Kept) -> list[str]:
    head = f"{kept.name:<16}  {kept.kind:<14}"
    used = datetime.fromtimestamp(kept.used).strftime("%Y-%m-%d")
    if kept.problem:
        return [f"{head}  damaged: {kept.problem}"]
    share = "whole" if kept.is_complete else f"{100 * kept.done / kept.count:.4g} %"
    about = f"{kept.count} {kept.unit}"
    lines = [f"{head}  {about:>15}  {share:>7}  {_size(kept.bytes):>8}  {used}", f"  {kept.model}"]
    if "width" in kept.details:
        lines[1] += f" ({kept.details['width']} numbers, {kept.details['precision']})"
    if first := kept.details.get("first_image"):
        lines.append(f"  first image: {first}")
    return lines


def _as_json(kept: Kept) -> dict[str, Any]:
    used = datetime.fromtimestamp(kept.used, UTC).replace(microsecond=0).isoformat()
    return {
        "cache": kept.name,
        "kind": kept.kind,
        "problem": kept.problem,
        "model": kept.model or None,
        kept.unit or "images": kept.count,
        "done": kept.done,
        "complete": kept.is_complete,
        "bytes": kept.bytes,
        "used": used,
        **kept.details,
    }


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.0f} kB"


def _plain(name: str) -> str:
    """Return a name as `ls` shows it, of one that was copied from the folder."""
    for prefix in ("embeddings-", "features-"):
        name = name.removeprefix(prefix)
    return name


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
