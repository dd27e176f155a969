"""`kuea-mllm lora`: tune an MLLM's language model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.align import Compat
from kuea_mllm.cli.common import (
    DryRun,
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
    from kuea_mllm.config.lora import LoraRecipe


class Quantization(StrEnum):
    """How the frozen language model is held."""

    NONE = "none"
    NF4 = "nf4"
    INT8 = "int8"


class Projector(StrEnum):
    """What happens to the projector."""

    TRAIN = "train"
    FREEZE = "freeze"


@verb
def lora(
    out: Out,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file.")
    ] = "lora/llava15_7b_665k_4x4090",
    model: Annotated[
        str | None, typer.Option(help="HF model directory, as swap writes it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Conversations: JSON list or JSONL, LLaVA or chat schema.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Folder that the images' paths are relative to.")
    ] = None,
    overrides: SetOption = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write OUT/merged, a plain model directory.")
    ] = False,
    dry_run: DryRun = False,
    resume: Resume = False,
    restart: Restart = False,
    num_processes: NumProcesses = 1,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Hold the frozen language model in fewer bits.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA layers.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Their scale is alpha / rank.")] = None,
    projector: Annotated[
        Projector | None, typer.Option(help="Train the projector, or leave it as it is.")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Samples that one device runs at once.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of one update, all processes together.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sample in tokens.")] = None,
    workers: Annotated[int | None, typer.Option(help="Decoders for each process.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser updates.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of order, LoRA start and dropout.")] = None,
    compat: Annotated[Compat | None, typer.Option(help="Follow paper or released code.")] = None,
    json_output: Json = False,
) -> None:
    """Tune an MLLM with LoRA on its language model; the vision tower stays as it is.

    Writes OUT/adapter (a PEFT directory, projector included), OUT/run.yaml, metrics.jsonl, figures.
    Until it is complete, a run lies in OUT.unfinished.
    """
    from kuea_mllm.config.lora import LoraRecipe
    from kuea_mllm.config.recipes import load_recipe
    from kuea_mllm.errors import UserError

    if resume and restart:
        raise UserError("--resume and --restart contradict each other.", "Give one of them.")
    if steps is not None and epochs is not None:
        raise UserError("--steps and --epochs contradict each other.", "Give one of them.")
    shorthands: dict[str, object] = {
        "model.path": model,
        "model.quantization": quantization and str(quantization),
        "data.file": data,
        "data.images": images,
        "data.max_length": max_length,
        "data.workers": workers,
        "lora.rank": rank,
        "lora.alpha": alpha,
        "lora.projector": projector and str(projector),
        "optim.micro_batch_size": micro_batch_size,
        "optim.batch_size": batch_size,
        "optim.steps": steps,
        "optim.epochs": epochs,
        "runtime.seed": seed,
        "runtime.device": device,
        "compat": compat and str(compat),
    }
    settings: dict[str, object] = {
        key: value for key, value in shorthands.items() if value is not None
    }
    # Of two ways to say one thing, the recipe's gives way.
    rivals = {
        "optim.steps": "optim.epochs",
        "optim.epochs": "optim.steps",
        "optim.batch_size": "optim.accumulation",
    }
    settings |= {other: None for given, other in rivals.items() if given in settings}
    loaded = load_recipe(recipe, LoraRecipe, settings=settings, overrides=overrides or [])
    if num_processes > 1 and not has_parent():
        refuse_two_launchers(num_processes)
    # Refused before anything heavy is imported.
    processes = max(num_processes, launched_world_size())
    loaded.accumulation(processes)
    if dry_run:
        from kuea_mllm.cli.lora_plan import print_dry_run

        if launched_rank() == 0:  # under torchrun each process comes here
            print_dry_run(loaded, processes=processes, json_output=json_output)
    elif num_processes > 1 and not has_parent():
        launch_processes(num_processes, out)
    else:
        _run(loaded, out, merge=merge, resume=resume, restart=restart, json_output=json_output)


def _run(
    recipe: LoraRecipe, out: Path, *, merge: bool, resume: bool, restart: bool, json_output: bool
) -> None:
    from kuea_mllm.cli.lora_plan import check_device_memory
    from kuea_mllm.reporting.tuning import draw_tuning_figures, print_tuning_result
    from kuea_mllm.training.distributed import init_if_launched, leave
    from kuea_mllm.tuning.run import run_tuning

    is_speaker = launched_rank() == 0
    init_if_launched(recipe.runtime.device)
    check_device_memory(recipe, processes=launched_world_size())
    result = run_tuning(
        recipe,
        out,
        merge=merge,
        progress=is_speaker and not json_output,
        finish=draw_tuning_figures,
        resume=resume,
        restart=restart,
    )
    leave()
    if not is_speaker:
        return
    content: dict[str, Any] = result.to_dict()
    if json_output:
        print_json(content)
    else:
        print_tuning_result(content)
