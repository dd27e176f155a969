"""What a LoRA tuning will take: memory per device, hours, disk. Needs no weights and no GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from kuea_mllm.cards import Card, find_card
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.errors import UserError
from kuea_mllm.planning.tuning_memory import (
    ModelSizes,
    Trained,
    model_sizes,
    moment_bytes,
    trained_sizes,
    tuning_memory,
)
from kuea_mllm.planning.tuning_models import TunedModel, find_mllm
from kuea_mllm.planning.tuning_options import tuning_changes
from kuea_mllm.planning.tuning_pass import PassSettings, tuning_counts
from kuea_mllm.planning.tuning_result import (
    TuningHours,
    TuningOption,
    TuningPlan,
    check_tuning_memory,
)

__all__ = ["TuningPlan", "check_tuning_memory", "plan_tuning"]

MIXTURE_SAMPLES = 665_298  # LLaVA-1.5's mixture; 40,688 of them are text alone
_WITH_IMAGE = 1 - 40_688 / 665_298

# Assumptions, each stated with every plan, and to be replaced by measurements of the machine and
# the data at hand (`kuea-mllm plan --mfu ... --mean-tokens ...`).
TUNING_MFU = 0.4
MEAN_TEXT_TOKENS = 300
PACKED_SHARE = 0.88


def plan_tuning(
    recipe: LoraRecipe,
    *,
    base: Path | None = None,
    card: Card | str = "rtx4090",
    processes: int = 1,
    mfu: float = TUNING_MFU,
    samples: int = MIXTURE_SAMPLES,
    mean_tokens: int | None = None,
    compare: bool = True,
) -> TuningPlan:
    """Plan a tuning by counting, and choose the way to run it that changes least and fits.

    Args:
        recipe: `model.path` must be known by name or be a directory; or give `base`.
        base: Model directory, instead of `model.path`.
        card: The kind of device, or its name.
        processes: How many of them.
        mfu: Share of the card's peak that a step reaches, recomputed layers included: an
            assumption.
        samples: Records in the training set.
        mean_tokens: Tokens of an average record, the image's included; None takes
            `MEAN_TEXT_TOKENS` and the image's.
        compare: Whether to look at other ways to run it, and choose.

    Raises:
        UserError: If the batch does not divide among the processes, or the model is not known.
    """
    device = find_card(card) if isinstance(card, str) else card
    if processes < 1:
        raise UserError(f"processes {processes} is less than 1.")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu {mfu} is not in (0, 1]: it is a share of the card's peak.")
    model = find_mllm(base or recipe.model.path, adapter=recipe.model.adapter)
    mean = mean_tokens or MEAN_TEXT_TOKENS + round(_WITH_IMAGE * model.tokens_per_image)
    settings: dict[str, Any] = {
        "model": model,
        "card": device,
        "processes": processes,
        "mfu": mfu,
        "samples": samples,
        "mean": min(mean, recipe.data.max_length),
    }
    resolved = recipe.resolved(processes=processes)
    plan = _plan(resolved, **settings)
    if not compare:
        return plan
    options: list[TuningOption] = []
    for change in tuning_changes(resolved, processes=processes):
        changed = _plan(change.recipe, **settings)
        options.append(
            TuningOption(
                method=changed.method,
                settings=change.settings,
                gib=changed.memory_gib,
                hours=changed.hours.total,
                fits=changed.fits,
                reason=change.reason,
            )
        )
    choice = next((option for option in options if option.fits), None)
    return replace(plan, options=tuple(options), choice=choice, reasons=_reasons(options, choice))


def _plan(
    recipe: LoraRecipe,
    *,
    model: TunedModel,
    card: Card,
    processes: int,
    mfu: float,
    samples: int,
    mean: int,
) -> TuningPlan:
    """Plan a resolved recipe as it is."""
    sizes = model_sizes(model)
    trained = trained_sizes(
        model,
        rank=recipe.lora.rank,
        targets=None if recipe.lora.targets is None else tuple(recipe.lora.targets),
        trains_projector=recipe.lora.projector == "train",
        trains_head=recipe.lora.train_lm_head,
    )
    optim, batch = recipe.optim, recipe.optim.batch_size or 1
    longest = tuning_counts(model, _pass(recipe, tokens=recipe.data.max_length), only="bytes")
    length = recipe.data.max_length if recipe.data.packing else mean
    # Weights that are packed cost no FLOPs, so that one count serves for both.
    average = replace(_pass(recipe, tokens=length), rows=1, quantised=False)
    counted = tuning_counts(model, average, only="flops")
    rows = samples
    if recipe.data.packing:
        rows = math.ceil(samples * mean / (PACKED_SHARE * length))
    accumulation = recipe.accumulation(processes)
    micro = math.ceil(rows / (processes * optim.micro_batch_size))
    if optim.last_update == "drop":
        micro -= micro % accumulation
    steps = optim.steps or math.ceil(math.ceil(micro / accumulation) * (optim.epochs or 1))
    flops = {"forward": counted.forward_flops, "backward": counted.backward_flops}
    state = 4 * trained.total + moment_bytes(optim.optimizer, trained.total)
    return TuningPlan(
        model=model.name,
        card=card,
        processes=processes,
        method=method_of(recipe),
        samples=samples,
        max_length=recipe.data.max_length,
        mean_tokens=length,
        micro_batch_size=optim.micro_batch_size,
        batch_size=batch,
        steps=steps,
        frozen={
            "language model": sizes.linear + sizes.rest,
            "vision tower": sizes.tower,
            **({"other encoders": sizes.other_encoders} if sizes.other_encoders else {}),
            "projector": 0 if trained.projector else sizes.projector,
        },
        trained={
            "LoRA": trained.lora,
            "projector": trained.projector,
            "output layer": trained.head,
        },
        lora_modules=trained.lora_modules,
        memory=tuning_memory(recipe, sizes, trained, longest, processes=processes),
        tflops_per_row={name: value / 1e12 for name, value in flops.items()},
        hours=_hours(
            recipe,
            sizes,
            trained,
            flops=sum(flops.values()),
            steps=steps,
            card=card,
            processes=processes,
            mfu=mfu,
            samples_per_row=samples / rows,
        ),
        # One more while the next is written.
        checkpoint_bytes=state * (recipe.checkpoint.keep + 1),
        adapter_bytes=4 * trained.total,
        merged_bytes=2 * sizes.total,
        assumptions=_assumptions(recipe, card, mfu=mfu, length=length),
    )


def method_of(recipe: LoraRecipe) -> str:
    """Return in words how a recipe runs."""
    base = {"nf4": "NF4", "int8": "8-bit", "none": "bf16"}[recipe.model.quantization]
    if recipe.model.quantization == "none" and recipe.runtime.dtype == "float32":
        base = "float32"
    spread = "FSDP" if recipe.runtime.sharding == "fsdp" else "plain DDP"
    optimizer = {
        "adamw": "",
        "adamw_8bit": ", 8-bit AdamW",
        "paged_adamw": ", paged AdamW",
        "paged_adamw_8bit": ", paged 8-bit AdamW",
    }[recipe.optim.optimizer]
    keeping = "" if recipe.runtime.gradient_checkpointing else ", all activations kept"
    return f"{spread} with a {base} base{optimizer}{keeping}"


def _pass(recipe: LoraRecipe, *, tokens: int) -> PassSettings:
    lora = recipe.lora
    return PassSettings(
        rows=recipe.optim.micro_batch_size,
        tokens=tokens,
        rank=lora.rank,
        targets=None if lora.targets is None else tuple(lora.targets),
        dropout=lora.dropout > 0,
        trains_projector=lora.projector == "train",
        trains_head=lora.train_lm_head,
        chunk=recipe.runtime.loss_chunk,
        checkpointing=recipe.runtime.gradient_checkpointing,
        quantised=recipe.model.quantization != "none",
        is_bf16=recipe.runtime.dtype == "bfloat16",
    )


def _hours(
    recipe: LoraRecipe,
    sizes: ModelSizes,
    trained: Trained,
    *,
    flops: int,
    steps: int,
    card: Card,
    processes: int,
    mfu: float,
    samples_per_row: float,
) -> TuningHours:
    rows = steps * (recipe.optim.batch_size or 1)
    computing = rows * flops / (processes * _peak(recipe, card) * mfu)
    rate = card.link * 1e9
    others = (processes - 1) / processes
    # Ring: a tensor goes around twice, less the own part.
    exchanging = steps * 2 * others * 4 * trained.total / rate
    if recipe.runtime.sharding == "fsdp":
        wide = 2 if recipe.runtime.dtype == "bfloat16" else 4
        passes = rows / (processes * recipe.optim.micro_batch_size)
        # Layers are gathered for the forward and again for the backward pass, while others run.
        gathering = passes * others * 2 * wide * sizes.linear / rate
        exchanging += max(0.0, gathering - computing)
    total = computing + exchanging
    return TuningHours(
        computing=computing / 3600,
        exchanging=exchanging / 3600,
        samples_per_second=rows * samples_per_row / total,
    )


def _peak(recipe: LoraRecipe, card: Card) -> float:
    if recipe.runtime.dtype == "bfloat16":
        return card.flops_per_second("bf16")
    return 1e12 * (card.tf32 if recipe.runtime.tf32 else card.fp32)


def _reasons(options: list[TuningOption], choice: TuningOption | None) -> tuple[str, ...]:
    if choice is None:
        return ("No way to run it that this planner knows fits the card.",)
    before = options[: options.index(choice)]
    reasons = [f"{option.method} does not fit: {option.gib:.1f} GiB." for option in before]
    reasons.append(f"{choice.method} is the first that fits: {choice.gib:.1f} GiB.")
    return (*reasons, choice.reason)


def _assumptions(recipe: LoraRecipe, card: Card, *, mfu: float, length: int) -> tuple[str, ...]:
    wide = "bf16" if recipe.runtime.dtype == "bfloat16" else "float32"
    found = [
        f"{mfu:.0%} of the {card.name}'s {wide} peak of {_peak(recipe, card) / 1e12:g} TFLOP/s",
        f"rows of {length} tokens on average for the hours (packed rows are full to "
        f"{PACKED_SHARE:.0%})"
        if recipe.data.packing
        else f"rows of {length} tokens on average for the hours, of {recipe.data.max_length} "
        "for the memory; every sample has an image",
        f"processes exchange tensors at {card.link:g} GB/s; under FSDP while they compute",
        "fused attention and fused AdamW; memory of the eager step",
        f"{card.name}: {card.gib:g} GiB, as torch reports it",
    ]
    if recipe.model.quantization != "none":
        found.append("the time to unpack weights is not counted")
    if recipe.optim.optimizer.startswith("paged"):
        moved = moment_bytes(recipe.optim.optimizer, 1)
        found.append(f"paged moments ({moved} bytes a weight) are wholly in the host's memory")
    return tuple(found)
