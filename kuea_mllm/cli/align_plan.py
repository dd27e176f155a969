"""What `kuea-mllm align` says or checks before it loads anything."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kuea_mllm.cli.common import print_json

if TYPE_CHECKING:
    from kuea_mllm.config.align import AlignRecipe

_MISSING = {
    "student.model": "--student",
    "teacher.model": "--teacher",
    "data.images": "--images",
}
_CARD = "rtx4090"  # the paper's
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def print_dry_run(recipe: AlignRecipe, *, processes: int, json_output: bool) -> None:
    """Print the resolved recipe and what is known without running it.

    With student, teacher and images at hand all of them are opened and checked. Otherwise models
    are built without data and counted.

    Raises:
        UserError: If an input is wrong.
    """
    missing = [f"{key} ({flag})" for key, flag in _MISSING.items() if not _value(recipe, key)]
    away = [
        str(_value(recipe, key))
        for key in ("student.model", "teacher.model")
        if _value(recipe, key) and not is_here(str(_value(recipe, key)))
    ]
    images: int | None = None
    plan: dict[str, Any] | None = None
    if not missing and not away:
        from kuea_mllm.alignment.inputs import open_inputs

        inputs = open_inputs(recipe)
        recipe, images = inputs.recipe, inputs.images.count
        count = "streamed" if images is None else str(images)
        notes = [f"{count} training images; nothing was run (--dry-run)."]
    else:
        recipe = recipe.resolved()
        notes, plan = _planned(recipe, missing, away, processes)
    if json_output:
        content = {"recipe": recipe.model_dump(mode="json"), "images": images}
        print_json(content | ({"plan": plan, "missing": missing} if missing or away else {}))
        return
    from kuea_mllm.config.recipes import recipe_to_yaml

    typer.echo(recipe_to_yaml(recipe), nl=False)
    for line in notes:
        typer.secho(f"# {line}".rstrip(), dim=True)


def is_here(model: str) -> bool:
    """Return whether the weights of a model are on this machine."""
    if Path(model).exists():
        return True
    if model.count("/") != 1 or ":" in model or model.startswith((".", "/", "~")):
        # A path that does not exist is an error to be shown; other libraries' names are planned.
        return ":" not in model
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(model, name), str) for name in _WEIGHTS)


def check_device_memory(recipe: AlignRecipe, *, processes: int) -> None:
    """Refuse a run that does not fit the memory of a CUDA device, before anything is loaded.

    Raises:
        UserError: With the largest parts and what to change.
    """
    if recipe.runtime.device not in {"auto", "cuda"} or not recipe.runtime.check_memory:
        return
    import torch

    if not torch.cuda.is_available():
        return
    from kuea_mllm.errors import UserError
    from kuea_mllm.log import LOGGER
    from kuea_mllm.planning.plan import plan_for_recipe
    from kuea_mllm.planning.result import check_memory

    try:
        plan = plan_for_recipe(recipe.resolved(), processes=processes)
    except UserError as error:
        LOGGER.info("memory is not planned ahead: %s", error.problem)
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    check_memory(plan, total)
    is_tight = plan.memory_bytes > total
    LOGGER.log(
        logging.WARNING if is_tight else logging.INFO,
        "planned memory: %.1f of %.1f GiB%s",
        plan.memory_gib,
        total / 2**30,
        ": it may run out; runtime.micro_batch_size makes room" if is_tight else "",
    )


def _planned(
    recipe: AlignRecipe, missing: list[str], away: list[str], processes: int
) -> tuple[list[str], dict[str, Any] | None]:
    notes = [f"not set: {', '.join(missing)}."] if missing else []
    if away:
        notes.append(f"not on this machine: {', '.join(away)}.")
    plan = None
    if _value(recipe, "student.model") and _value(recipe, "teacher.model"):
        from kuea_mllm.cards import find_card
        from kuea_mllm.planning.fitting import ways_to_fit
        from kuea_mllm.planning.plan import plan_alignment
        from kuea_mllm.planning.text import plan_text

        card = find_card(_CARD)
        planned = plan_alignment(recipe, card=card, processes=processes)
        ways = [] if planned.fits else ways_to_fit(recipe, card=card, processes=processes)
        plan = planned.to_dict()
        notes.append(
            f"Counted on models without data, for {card.name}; nothing was opened. Other cards: "
            "kuea-mllm plan."
        )
        notes += ["", *plan_text(planned, ways).splitlines()]
    return [*notes, "Nothing was run (--dry-run)."], plan


def _value(recipe: AlignRecipe, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)
