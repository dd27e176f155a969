"""Plans of tunings as text: for the terminal, for recipe headers, and the table of all recipes."""

from __future__ import annotations

from kuea_mllm.cards import GIB, Card
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.config.recipes import list_shipped, load_recipe
from kuea_mllm.planning.text import SECOND, reference_hardware
from kuea_mllm.planning.tuning import plan_tuning
from kuea_mllm.planning.tuning_result import TuningOption, TuningPlan


def tuning_plan_text(plan: TuningPlan) -> str:
    """Return a plan for people."""
    trained = ", ".join(f"{name} {count:,}" for name, count in plan.trained.items() if count)
    lines = [
        f"{plan.model}: {plan.method}",
        f"{plan.processes} x {plan.card.name}, {plan.micro_batch_size} x {plan.max_length} tokens "
        f"at once, {plan.batch_size} rows an update",
        f"trained: {trained} (LoRA in {plan.lora_modules} layers)",
        "",
        "memory per device, GiB",
    ]
    lines += [f"  {part.name:<18}{part.bytes / GIB:>7.2f}  {part.reason}" for part in plan.memory]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {'total':<18}{plan.memory_gib:>7.2f}  of {plan.card.gib:g}: {verdict}")
    lines += ["", "ways to run it, those that change least first"]
    lines += [_option(option, plan) for option in plan.options]
    lines += ["", "chosen" if plan.choice else "not possible"]
    lines += [f"  {reason}" for reason in plan.reasons]
    lines += ["", *_time_and_disk(plan), "", "assumed"]
    lines += [f"  {assumption}" for assumption in plan.assumptions]
    return "\n".join(lines)


def tuning_estimate(plan: TuningPlan) -> str:
    """Return hours and memory in one phrase, as recipe headers state them."""
    verdict = "" if plan.fits else " (does not fit)"
    return (
        f"{plan.hours.total:.1f} h, {plan.memory_gib:.1f} GiB{verdict} on "
        f"{plan.processes} x {plan.card.name}"
    )


def tuning_header(name: str, recipe: LoraRecipe, card: Card, processes: int) -> str:
    """Return the third header line of a recipe, without the `# `."""
    first = plan_tuning(recipe, card=card, processes=processes, compare=False)
    second = plan_tuning(recipe, card=SECOND[0], processes=SECOND[1], compare=False)
    return (
        f"Estimate: {tuning_estimate(first)}; {tuning_estimate(second)} "
        f"(kuea-mllm plan --recipe {name} --card {card.key} --processes {processes})."
    )


def tuning_recipes_markdown() -> str:
    """Return the table of all shipped tuning recipes."""
    rows = [
        f"| recipe | what for | its reference hardware | 1 x {SECOND[0].name} |",
        "|---|---|---|---|",
    ]
    for shipped in list_shipped("lora"):
        hardware = reference_hardware(shipped)
        cells = ["-", "-"]
        if hardware is not None:
            recipe = load_recipe(shipped.name, LoraRecipe)
            plans = (
                plan_tuning(recipe, card=card, processes=processes, compare=False)
                for card, processes in (hardware, SECOND)
            )
            cells = [tuning_estimate(plan) for plan in plans]
        rows.append(f"| `{shipped.name}` | {shipped.purpose} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows) + "\n"


def _option(option: TuningOption, plan: TuningPlan) -> str:
    verdict = "fits" if option.fits else "no"
    settings = " ".join(f"--set {s}" for s in option.settings) or "as it is"
    mark = "*" if option == plan.choice else " "
    numbers = f"{option.gib:>6.1f} GiB  {option.hours:>6.1f} h  {verdict:<5}"
    return f"{mark} {numbers} {option.method:<42} {settings}"


def _time_and_disk(plan: TuningPlan) -> list[str]:
    hours = plan.hours
    flops = ", ".join(f"{name} {value:.1f}" for name, value in plan.tflops_per_row.items())
    return [
        f"training  {hours.total:.1f} hours ({plan.steps} updates, "
        f"{hours.samples_per_second:.1f} samples/s in all; {hours.exchanging:.1f} hours of it for "
        "traffic between processes)",
        f"TFLOP     {flops} for a row of {plan.mean_tokens} tokens",
        f"disk      checkpoints up to {plan.checkpoint_bytes / GIB:.1f} GiB, adapter "
        f"{plan.adapter_bytes / GIB:.1f} GiB, merged model {plan.merged_bytes / GIB:.1f} GiB",
    ]
