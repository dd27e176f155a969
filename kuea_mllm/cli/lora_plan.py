"""What `kuea-mllm lora` says or checks before it loads anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kuea_mllm.cli.common import print_json

if TYPE_CHECKING:
    from kuea_mllm.config.lora import LoraRecipe

_MISSING = {"model.path": "--model", "data.file": "--data"}
_CARD = "rtx4090"  # the paper's


def print_dry_run(recipe: LoraRecipe, *, processes: int, json_output: bool) -> None:
    """Print the resolved recipe, what was found, and the plan.

    With model and data at hand both are opened and checked, but no weight is loaded. Otherwise the
    recipe's model is planned as far as it is known.

    Raises:
        UserError: If an input is wrong.
    """
    missing = [f"{key} ({flag})" for key, flag in _MISSING.items() if not _value(recipe, key)]
    notes: list[str] = []
    samples: int | None = None
    if not missing:
        from kuea_mllm.tuning.inputs import open_tuning_inputs
        from kuea_mllm.tuning.sharding import require_shardable

        require_shardable(recipe, processes=processes)
        inputs = open_tuning_inputs(recipe, progress=not json_output)
        samples = len(inputs.mixture)
        notes.append(f"{samples} records; model {inputs.base} ({inputs.adapter.name}).")
    else:
        notes.append(f"not set: {', '.join(missing)}.")
    resolved = recipe.resolved(processes=processes)
    plan: dict[str, Any] | None = None
    if resolved.model.path:
        from kuea_mllm.cards import find_card
        from kuea_mllm.planning.tuning import MIXTURE_SAMPLES, plan_tuning
        from kuea_mllm.planning.tuning_text import tuning_plan_text

        card = find_card(_CARD)
        planned = plan_tuning(
            resolved, card=card, processes=processes, samples=samples or MIXTURE_SAMPLES
        )
        plan = planned.to_dict()
        notes += [f"Counted for {card.name}; other cards: kuea-mllm plan.", ""]
        notes += tuning_plan_text(planned).splitlines()
    notes.append("Nothing was run (--dry-run).")
    if json_output:
        print_json(
            {
                "recipe": resolved.model_dump(mode="json"),
                "records": samples,
                "plan": plan,
                "missing": missing,
            }
        )
        return
    from kuea_mllm.config.recipes import recipe_to_yaml

    typer.echo(recipe_to_yaml(resolved), nl=False)
    for line in notes:
        typer.secho(f"# {line}".rstrip(), dim=True)


def check_device_memory(recipe: LoraRecipe, *, processes: int) -> None:
    """Refuse a run that does not fit the memory of a CUDA device, before anything is loaded.

    Raises:
        UserError: With the largest parts and what would fit.
    """
    device = recipe.runtime.device
    if not (device == "auto" or device.startswith("cuda")) or not recipe.runtime.check_memory:
        return
    if recipe.model.path is None or not Path(recipe.model.path).is_dir():
        return  # said when the inputs are opened
    import torch

    if not torch.cuda.is_available():
        return
    from kuea_mllm.cards import card_or_device
    from kuea_mllm.errors import UserError
    from kuea_mllm.log import LOGGER
    from kuea_mllm.planning.tuning import plan_tuning
    from kuea_mllm.planning.tuning_result import check_tuning_memory

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        plan = plan_tuning(
            recipe.resolved(processes=processes),
            card=card_or_device(properties.name, properties.total_memory),
            processes=processes,
        )
    except UserError as error:
        LOGGER.info("memory is not planned ahead: %s", error.problem)
        return
    check_tuning_memory(plan, properties.total_memory)
    LOGGER.info(
        "planned memory: %.1f of %.1f GiB", plan.memory_gib, properties.total_memory / 2**30
    )


def _value(recipe: LoraRecipe, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)
