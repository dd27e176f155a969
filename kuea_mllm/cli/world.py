"""`kuea-mllm world`: the mini world behind the quickstart, rebuilt and studied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, Out, print_json, verb

app = typer.Typer(help="Build and study the mini world.", no_args_is_help=True)


@app.command()
@verb
def build(
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of CLIP and LLaVA.")] = 0,
    teacher: Annotated[
        Path | None, typer.Option(help="Reuse this teacher instead of training one.")
    ] = None,
) -> None:
    """Train the mini CLIP, teacher and LLaVA from nothing (10 to 20 minutes on one core)."""
    from kuea_mllm.miniworld.build import build_world

    build_world(out, seed=seed, teacher=teacher)
    typer.echo(f"world: {out}")


@app.command()
@verb
def flamingo(
    out: Out,
    world: Annotated[
        Path | None, typer.Option(help="A built world, whose CLIP is used; the package's if none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the Flamingo and its training texts.")] = 0,
    questions: Annotated[
        int, typer.Option(min=1, help="Questions for each task and number of shots.")
    ] = 200,
    json_output: Json = False,
) -> None:
    """Train a mini Flamingo on the CLIP of a world, and score it at 0 and 4 shots.

    A few minutes on one core. The result is a directory for `swap`, `verify` and Python.
    """
    from kuea_mllm.miniworld import ASSETS
    from kuea_mllm.miniworld.build_flamingo import build_flamingo

    scores = build_flamingo(out, clip=(world or ASSETS) / "clip", seed=seed, questions=questions)
    if json_output:
        print_json({"flamingo": str(out), "scores": scores})
        return
    from rich.console import Console

    from kuea_mllm.reporting.shots import shots_text

    Console().print(shots_text(scores))
    typer.echo(f"flamingo: {out}")


@app.command()
@verb
def images(
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 12_000,
    split: Annotated[str, typer.Option(help="train, validation or test scans.")] = "train",
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Write a folder of pictures, as an image data set would lie on disk."""
    from kuea_mllm.miniworld.images import write_images

    write_images(out, split=split, count=count, seed=seed)
    typer.echo(f"images: {out}")


@app.command()
@verb
def tasks(
    out: Out,
    split: Annotated[str, typer.Option(help="train, validation or test scans.")] = "test",
    questions: Annotated[int, typer.Option(min=1, help="Questions for each task.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Write the benchmarks as task files for lmms-eval; pass the folder to `eval --tasks`."""
    from kuea_mllm.miniworld.tasks import write_tasks

    names = write_tasks(out, split=split, questions_per_task=questions, seed=seed)
    typer.echo(f"{', '.join(names)}: {out}")


@app.command()
@verb
def extras(
    worlds: Annotated[Path, typer.Option(help="Folder of built worlds (seed0, seed1, ...).")],
    seeds: Annotated[int, typer.Option(min=1, help="How many of them.")] = 5,
) -> None:
    """Add what `objectives` asks for: a self-supervised teacher, CLIPs of a broader domain.

    What is there is kept. About 5 minutes and 3 minutes for each CLIP, on one core.
    """
    from kuea_mllm.workflows.studies.objectives import build_extras

    build_extras(worlds, seeds=range(seeds))
    typer.echo(f"worlds: {worlds}")


@app.command()
@verb
def objectives(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; goes on there.")],
    worlds: Annotated[Path, typer.Option(help="Folder of built worlds, with their extras.")],
    seeds: Annotated[int, typer.Option(min=1, help="Worlds to report on.")] = 5,
    questions: Annotated[int, typer.Option(min=20, help="Questions for each task.")] = 600,
    jobs: Annotated[int, typer.Option(min=1, help="Alignments at once.")] = 1,
    json_output: Json = False,
) -> None:
    """Compare objectives on several worlds, with settings chosen on other pictures.

    An hour on two quiet cores for five worlds; interrupted, it goes on where it was.
    """
    from kuea_mllm.workflows.studies.objectives import objectives_markdown, run_objectives

    record = run_objectives(
        out, worlds=worlds, seeds=range(seeds), teacher="teacher", jobs=jobs, questions=questions
    )
    if json_output:
        print_json(record)
    else:
        typer.echo(objectives_markdown(record))
        typer.echo(f"study: {out}")


@app.command()
@verb
def study(
    out: Out,
    seeds: Annotated[int, typer.Option(min=1, help="Worlds to build and align.")] = 3,
    worlds: Annotated[
        Path | None, typer.Option(help="Folder of built worlds (seed0, seed1, ...) to reuse.")
    ] = None,
    questions: Annotated[int, typer.Option(min=20, help="Questions for each task.")] = 1500,
    split: Annotated[str, typer.Option(help="Scans to measure on.")] = "test",
    jobs: Annotated[int, typer.Option(min=1, help="Seeds studied at once.")] = 1,
    json_output: Json = False,
) -> None:
    """Measure what alignment does to encoder and LLaVA over several seeds, with spread."""
    from kuea_mllm.workflows.studies.study import print_study, run_study

    result = run_study(out, seeds=seeds, worlds=worlds, questions=questions, split=split, jobs=jobs)
    if json_output:
        print_json(result)
    else:
        print_study(result)
        typer.echo(f"study: {out}")


@app.command()
@verb
def peft(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; goes on there.")],
    seeds: Annotated[int, typer.Option(min=1, help="Worlds to build, align and tune.")] = 3,
    worlds: Annotated[
        Path | None, typer.Option(help="Folder of built worlds (seed0, seed1, ...) to reuse.")
    ] = None,
    questions: Annotated[int, typer.Option(min=20, help="Questions for each task.")] = 1500,
    split: Annotated[str, typer.Option(help="Scans to measure on.")] = "test",
    set_align: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Override one key of recipe align/miniworld."),
    ] = None,
    set_lora: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Override one key of recipe lora/miniworld."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds studied at once.")] = 1,
    json_output: Json = False,
) -> None:
    """Measure the mini LLaVA as it is, +align, +peft (LoRA) and +both over several seeds.

    A few minutes for each seed on one core; interrupted, it goes on where it was.
    """
    from kuea_mllm.workflows.studies.peft_table import run_peft_study

    record = run_peft_study(
        out,
        seeds=seeds,
        worlds=worlds,
        questions=questions,
        split=split,
        jobs=jobs,
        align=set_align or [],
        lora=set_lora or [],
    )
    if json_output:
        print_json(record)
        return
    from rich.console import Console

    from kuea_mllm.reporting.peft import peft_text

    Console().print(*peft_text(record), sep="\n\n")
    typer.echo(f"study: {out}")


@app.command()
@verb
def probe(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; goes on there.")],
    seeds: Annotated[int, typer.Option(min=1, help="Worlds to build, align and probe.")] = 3,
    worlds: Annotated[
        Path | None, typer.Option(help="Folder of built worlds (seed0, seed1, ...) to reuse.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=20, help="Pictures in each set.")] = 1000,
    split: Annotated[str, typer.Option(help="Scans to measure on.")] = "test",
    jobs: Annotated[int, typer.Option(min=1, help="Seeds studied at once.")] = 1,
    json_output: Json = False,
) -> None:
    """Probe original and aligned towers and two baselines over several seeds, with intervals.

    Zero-shot, retrieval, linear and patch probes and pairs as in MMVP-VLM, by the code of
    `kuea-mllm probe`. Interrupted, it goes on where it was.
    """
    from kuea_mllm.reporting.probe_study import probe_study_markdown
    from kuea_mllm.workflows.studies.probe_study import run_probe_study

    record = run_probe_study(
        out, seeds=seeds, worlds=worlds, split=split, per_set=pictures, jobs=jobs
    )
    if json_output:
        print_json(record)
        return
    typer.echo(probe_study_markdown(record))
    typer.echo(f"study: {out}")
