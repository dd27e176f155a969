"""Plans as text: for the terminal, for recipe headers, and the table of all recipes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kuea_mllm.cards import CARDS, GIB, Card
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import ShippedRecipe, list_shipped, load_recipe
from kuea_mllm.planning.fitting import Alternative
from kuea_mllm.planning.plan import plan_alignment
from kuea_mllm.planning.result import AlignmentPlan, Hours

_HARDWARE = re.compile(r"--card (\S+) --processes (\d+)")
SECOND = (CARDS["h100"], 1)


def plan_text(plan: AlignmentPlan, alternatives: Sequence[Alternative] = ()) -> str:
    """Return a plan for people.

    Args:
        plan: What was counted.
        alternatives: From `ways_to_fit`; shown where given.
    """
    lines = [
        f"{plan.student} towards {', '.join(plan.teachers)}",
        f"{plan.processes} x {plan.card.name}, {plan.images_per_device} images each"
        + (
            f" in pieces of {plan.micro_batch_size}"
            if plan.micro_batch_size < plan.images_per_device
            else ""
        ),
        "",
        "memory per device, GiB",
    ]
    lines += [f"  {part.name:<18}{part.bytes / GIB:>7.2f}  {part.reason}" for part in plan.memory]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {'total':<18}{plan.memory_gib:>7.2f}  of {plan.card.gib:g}: {verdict}")
    if not plan.fits:
        lines += ["", "fits with"] if alternatives else ["", "no setting of this planner fits"]
    lines += [
        f"  {alternative.gib:>6.1f} GiB, {alternative.hours:>5.1f} h  "
        f"{' '.join(f'--set {s}' for s in alternative.settings) or 'as it is'}"
        for alternative in alternatives
    ]
    lines += ["", "GFLOP per image"]
    lines += [f"  {name:<38}{value:>9.1f}" for name, value in plan.gflops_per_image.items()]
    lines += ["", *_time_and_disk(plan), "", "assumed"]
    lines += [f"  {assumption}" for assumption in plan.assumptions]
    return "\n".join(lines)


def _time_and_disk(plan: AlignmentPlan) -> list[str]:
    hours = plan.hours
    bound = ", decode-bound" if hours.bound == "decode" else ""
    what = f"{plan.steps} steps" if plan.steps else "one pass over the images"
    lines = [
        f"training      {hours.training:.1f} hours ({what}, "
        f"{hours.images_per_second:.0f} images/s in all{bound})"
    ]
    if hours.targets:
        lines.append(f"target cache  {hours.targets:.1f} hours, once for {plan.images} images")
    disk = f"checkpoints up to {plan.checkpoint_bytes / GIB:.1f} GiB"
    if plan.cache_bytes:
        disk = f"target cache {plan.cache_bytes / GIB:.1f} GiB, {disk}"
    return [*lines, f"disk          {disk}"]


def estimate(plan: AlignmentPlan) -> str:
    """Return hours and memory in one phrase, as recipe headers state them."""
    bound = ", decode-bound" if plan.hours.bound == "decode" else ""
    verdict = "" if plan.fits else " (does not fit)"
    return (
        f"{_hours(plan.hours)} h{bound}, {plan.memory_gib:.1f} GiB{verdict} on "
        f"{plan.processes} x {plan.card.name}"
    )


def header_estimate(name: str, recipe: AlignRecipe, card: Card, processes: int) -> str:
    """Return the third header line of a recipe, without the `# `."""
    first = plan_alignment(recipe, card=card, processes=processes)
    second = plan_alignment(recipe, card=SECOND[0], processes=SECOND[1])
    return (
        f"Estimate: {estimate(first)}; {estimate(second)} "
        f"(kuea-mllm plan --recipe {name} --card {card.key} --processes {processes})."
    )


def reference_hardware(recipe: ShippedRecipe) -> tuple[Card, int] | None:
    """Return card and number of processes that a recipe's header names, None without."""
    found = _HARDWARE.search(recipe.text)
    return None if found is None else (CARDS[found[1]], int(found[2]))


def recipes_markdown() -> str:
    """Return the table of all shipped alignment recipes."""
    rows = [
        f"| recipe | what for | its reference hardware | 1 x {SECOND[0].name} |",
        "|---|---|---|---|",
    ]
    for shipped in list_shipped("align"):
        hardware = reference_hardware(shipped)
        cells = ["-", "-"]
        if hardware is not None:
            recipe = load_recipe(shipped.name, AlignRecipe)
            plans = (
                plan_alignment(recipe, card=card, processes=processes)
                for card, processes in (hardware, SECOND)
            )
            cells = [estimate(plan) for plan in plans]
        rows.append(f"| `{shipped.name}` | {shipped.purpose} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows) + "\n"


def _hours(hours: Hours) -> str:
    if not hours.targets:
        return f"{hours.training:.1f}"
    return f"{hours.training:.1f} + {hours.targets:.1f}"
