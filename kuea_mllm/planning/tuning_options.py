"""Ways to run a tuning, from the plainest to those that change or cost most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kuea_mllm.config.lora import LoraRecipe

_PLAIN = {"model.quantization": "none", "optim.optimizer": "adamw", "runtime.sharding": "none"}
_KEPT = "Nothing of the recipe's arithmetic changes."


@dataclass(frozen=True)
class TuningChange:
    """A recipe with some keys changed.

    Attributes:
        recipe: Resolved.
        settings: `KEY=VALUE` texts of what differs from the recipe that was given.
        reason: What the change costs, in a sentence.
    """

    recipe: LoraRecipe
    settings: tuple[str, ...]
    reason: str


def tuning_changes(recipe: LoraRecipe, *, processes: int) -> list[TuningChange]:
    """Return the ways to run a recipe, those that change least first, itself among them.

    Args:
        recipe: Resolved.
        processes: Devices; with one there is nothing to divide among.
    """
    small: dict[str, Any] = {}
    steps: list[tuple[dict[str, Any], str]] = [(_PLAIN, _KEPT)]
    if recipe.optim.micro_batch_size > 1:
        small |= {"optim.micro_batch_size": 1}
        steps.append((_PLAIN | small, "The same update in smaller pieces."))
    if not recipe.runtime.gradient_checkpointing:
        small |= {"runtime.gradient_checkpointing": True}
        steps.append((_PLAIN | small, "The same values; layers are computed twice."))
    plain = _PLAIN | small
    steps += [
        (
            plain | {"optim.optimizer": "paged_adamw"},
            "The same values; moments cross to the host's memory at every update.",
        ),
        (
            plain | {"optim.optimizer": "adamw_8bit"},
            "Rounds the moments of AdamW; nothing crosses to the host.",
        ),
        (
            plain | {"model.quantization": "nf4"},
            "Rounds the frozen weights while they are tuned against; merging takes the originals.",
        ),
        (
            plain | {"model.quantization": "nf4", "optim.optimizer": "paged_adamw"},
            "Rounds the frozen weights, and moments cross to the host at every update.",
        ),
    ]
    if processes > 1:
        fsdp = (
            "Exact, but every process gathers all weights twice for every micro-batch: "
            "slow without fast links between the devices."
        )
        steps.append((plain | {"runtime.sharding": "fsdp"}, fsdp))
    changes = [
        TuningChange(_changed(recipe, change), _settings(recipe, change), reason)
        for change, reason in steps
    ]
    if not any(change.recipe == recipe for change in changes):
        own = "As the recipe asks."
        changes.append(TuningChange(recipe, (), own))
    return changes


def _changed(recipe: LoraRecipe, change: dict[str, Any]) -> LoraRecipe:
    content = recipe.model_dump()
    for path, value in change.items():
        section, key = path.split(".")
        content[section][key] = value
    return LoraRecipe.parse(content, origin="plan")


def _settings(recipe: LoraRecipe, change: dict[str, Any]) -> tuple[str, ...]:
    content = recipe.model_dump()
    found = []
    for path, value in change.items():
        section, key = path.split(".")
        if content[section][key] != value:
            found.append(f"{path}={str(value).lower() if isinstance(value, bool) else value}")
            if path == "optim.micro_batch_size":
                found.append(f"optim.batch_size={recipe.optim.batch_size}")
    return tuple(found)
