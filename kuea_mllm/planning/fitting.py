"""Settings under which a run fits a card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kuea_mllm.cards import Card
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.errors import RecipeError
from kuea_mllm.planning.plan import plan_alignment
from kuea_mllm.planning.result import AlignmentPlan


@dataclass(frozen=True)
class Alternative:
    """Settings under which a run fits.

    Attributes:
        settings: `KEY=VALUE` texts for `--set`; empty for the recipe as it is.
        gib: Memory of one device.
        hours: Training and target cache together.
    """

    settings: tuple[str, ...]
    gib: float
    hours: float


def ways_to_fit(recipe: AlignRecipe, *, card: Card, processes: int = 1) -> list[Alternative]:
    """Return settings under which a run fits, those that change the least first.

    For each of: the recipe as it is, with bf16, with cached targets, with both, with gradient
    checkpointing, with all three: the largest number of images at once that fits, if any does.
    """
    changes: list[dict[str, Any]] = [
        {},
        {"runtime.precision": "bf16"},
        {"targets.cache": True},
        {"runtime.precision": "bf16", "targets.cache": True},
        {"runtime.gradient_checkpointing": True},
        {
            "runtime.precision": "bf16",
            "targets.cache": True,
            "runtime.gradient_checkpointing": True,
        },
    ]
    found: list[Alternative] = []
    for change in changes:
        changed = _changed(recipe, change)
        if changed is None or (change and changed == recipe):
            continue
        fitting = _largest_fitting(changed, card, processes)
        if fitting is None:
            continue
        settings = [f"{key}={_text(value)}" for key, value in change.items()]
        if fitting.micro_batch_size < fitting.images_per_device:
            settings.append(f"runtime.micro_batch_size={fitting.micro_batch_size}")
        found.append(Alternative(tuple(settings), fitting.memory_gib, fitting.hours.total))
    return found


def _largest_fitting(recipe: AlignRecipe, card: Card, processes: int) -> AlignmentPlan | None:
    share = recipe.optim.batch_size // processes
    for size in (n for n in range(share, 0, -1) if share % n == 0):
        cut = _changed(recipe, {"runtime.micro_batch_size": size if size < share else None})
        plan = plan_alignment(cut or recipe, card=card, processes=processes)
        if plan.fits:
            return plan
    return None


def _changed(recipe: AlignRecipe, change: dict[str, Any]) -> AlignRecipe | None:
    content = recipe.model_dump()
    for path, value in change.items():
        section, key = path.split(".")
        content[section][key] = value
    try:
        return AlignRecipe.parse(content, origin="plan")
    except RecipeError:  # such as a cache beside a random transform
        return None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
