"""`kuea-mllm align`: fine-tune a tower towards a teacher."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.common import (
    Activation,
    DryRun,
    Heads,
    Json,
    NumProcesses,
    Out,
    Restart,
    Resume,
    SetOption,
    print_json,
    verb,
)
from kuea_mllm.cli.launching import launch_processes, refuse_two_launchers
from kuea_mllm.launch import has_parent, launched_rank, launched_world_size

if TYPE_CHECKING:
    from kuea_mllm.config.align import AlignRecipe


class Precision(StrEnum):
    """Arithmetic of the towers."""

    FP32 = "fp32"
    BF16 = "bf16"


class Readout(StrEnum):
    """Which output of the teacher is its embedding."""

    CLS = "cls"
    POOLED = "pooled"
    MEAN_PATCH = "mean_patch"


class Compat(StrEnum):
    """Whose conventions are followed where paper and released code disagree."""

    PAPER = "paper"
    RELEASED = "released"


@verb
def align(
    out: Out,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file.")
    ] = "align/vit_l_14",
    student: Annotated[
        str | None, typer.Option(help="Tower: HF directory, hub id or checkpoint file.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Vision model: HF directory, hub id or timm:NAME.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Training images: folder, list, tar shards, parquet, data set or pack."),
    ] = None,
    heldout: Annotated[
        str | None, typer.Option(help="Images to measure on; else some of --images.")
    ] = None,
    overrides: SetOption = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    restart: Restart = False,
    num_processes: NumProcesses = 1,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Arithmetic of the towers.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in one kernel matrix, all processes together.")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Images embedded at once; same gradients, less memory.")
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option("--cache/--no-cache", help="Compute the frozen towers' embeddings once."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Decoders for each process.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser updates.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order.")] = None,
    compat: Annotated[Compat | None, typer.Option(help="Follow paper or released code.")] = None,
    teacher_readout: Annotated[
        Readout | None, typer.Option(help="Output of the teacher to align with.")
    ] = None,
    activation: Activation = None,
    heads: Heads = None,
    json_output: Json = False,
) -> None:
    """Align a CLIP-family tower with a vision teacher by matching kernel matrices.

    Writes OUT/tower (a plain Hugging Face tower directory), OUT/run.yaml, metrics.jsonl, figures.
    Until it is complete, a run lies in OUT.unfinished.
    """
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe
    from kuea_mllm.errors import UserError

    if resume and restart:
        raise UserError("--resume and --restart contradict each other.", "Give one of them.")
    shorthands: dict[str, object] = {
        "student.model": student,
        "student.activation": activation,
        "student.heads": heads,
        "teacher.model": teacher,
        "teacher.readout": teacher_readout and str(teacher_readout),
        "data.images": images,
        "data.heldout": heldout,
        "data.workers": workers,
        "targets.cache": cache,
        "optim.steps": steps,
        "optim.batch_size": batch_size,
        "runtime.seed": seed,
        "runtime.device": device,
        "runtime.precision": precision and str(precision),
        "runtime.micro_batch_size": micro_batch_size,
        "compat": compat and str(compat),
    }
    settings = {key: value for key, value in shorthands.items() if value is not None}
    if steps is not None:
        settings["optim.epochs"] = None
    loaded = load_recipe(recipe, AlignRecipe, settings=settings, overrides=overrides or [])
    if num_processes > 1 and not has_parent():
        _require_shareable(loaded, num_processes)
    if loaded.method == "projection" and (resume or restart or launched_world_size() > 1):
        raise UserError(
            "method 'projection' is one pass over the images in one process.",
            "Leave out --resume, --restart and torchrun.",
        )
    if dry_run:
        from kuea_mllm.cli.align_plan import print_dry_run

        print_dry_run(loaded, processes=num_processes, json_output=json_output)
    elif num_processes > 1 and not has_parent():
        launch_processes(num_processes, out)
    else:
        _run(loaded, out, resume=resume, restart=restart, json_output=json_output)


def _require_shareable(recipe: AlignRecipe, processes: int) -> None:
    """Refuse what the processes would refuse, before they are started."""
    from kuea_mllm.errors import UserError

    refuse_two_launchers(processes)
    if recipe.method == "projection":
        raise UserError(
            "method 'projection' is one pass over the images in one process.",
            "Leave out --num-processes.",
        )
    if recipe.optim.batch_size % processes:
        raise UserError(
            f"optim.batch_size {recipe.optim.batch_size} does not divide among "
            f"{processes} processes.",
            "The batch size is that of all processes together; choose a multiple.",
        )


def _run_projection(recipe: AlignRecipe, out: Path, *, json_output: bool) -> None:
    from kuea_mllm.alignment.projection_run import run_projection

    found, measured = run_projection(recipe, out, progress=not json_output)
    weights = out / "projection" / "projection.safetensors"
    if json_output:
        print_json({"directory": str(out), "projection": str(weights), "after": measured})
        return
    typer.echo(
        f"projection of {found.images} images: {100 * measured['heldout_residual']:.1f} % of the "
        f"squared norm is left on held-out images (mean cosine "
        f"{measured['heldout_cosine_mean']:.3f})"
    )
    typer.echo(f"projection: {weights}")


def _run(recipe: AlignRecipe, out: Path, *, resume: bool, restart: bool, json_output: bool) -> None:
    if recipe.method == "projection":
        _run_projection(recipe, out, json_output=json_output)
        return
    from kuea_mllm.alignment.run import run_alignment
    from kuea_mllm.cli.align_plan import check_device_memory
    from kuea_mllm.reporting.alignment import draw_alignment_figures, print_alignment_result
    from kuea_mllm.training.distributed import init_if_launched, leave

    is_speaker = launched_rank() == 0
    init_if_launched(recipe.runtime.device)
    check_device_memory(recipe, processes=launched_world_size())
    result = run_alignment(
        recipe,
        out,
        progress=is_speaker and not json_output,
        finish=draw_alignment_figures,
        resume=resume,
        restart=restart,
    )
    leave()
    if not is_speaker:
        return
    if json_output:
        record: dict[str, Any] = {
            "directory": str(result.directory),
            "tower": str(result.tower),
            "before": result.before,
            "after": result.after,
            "seconds": round(result.seconds, 1),
        }
        print_json(record)
    else:
        print_alignment_result(
            str(result.directory), before=result.before, after=result.after, seconds=result.seconds
        )
