"""What an alignment run will take: memory per device, hours, disk. Needs no weights and no GPU."""

from __future__ import annotations

import math

from kuea_mllm.cards import Card, find_card
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.errors import UserError
from kuea_mllm.planning.memory import device_memory
from kuea_mllm.planning.models_of_recipe import (
    Models,
    find_models,
    patch_work,
    runs_original,
    runs_teachers,
)
from kuea_mllm.planning.result import AlignmentPlan, Hours
from kuea_mllm.planning.towers import inference_flops, training_counts

IMAGENET_IMAGES = 1_281_167

# Assumptions, each stated with every plan. The first two are to be replaced by measurements of
# the machine at hand (`kuea-mllm plan --mfu ... --images-per-core ...`).
DEFAULT_MFU = 0.5
DEFAULT_IMAGES_PER_CORE = 100.0  # JPEG of ImageNet size: decode, resize, crop


def plan_alignment(
    recipe: AlignRecipe,
    *,
    card: Card,
    processes: int = 1,
    mfu: float = DEFAULT_MFU,
    images: int = IMAGENET_IMAGES,
    images_per_core: float = DEFAULT_IMAGES_PER_CORE,
) -> AlignmentPlan:
    """Plan a run by counting.

    Args:
        recipe: `student.model` and `teacher.model` must be known by name or be directories with a
            config.json.
        card: The kind of device.
        processes: How many of them.
        mfu: Share of the card's peak that a step reaches: an assumption.
        images: Size of the training set before `data.fraction` and `data.count`.
        images_per_core: Images that one decoding process gives per second: an assumption.

    Raises:
        UserError: If the batch does not divide among the processes, or a model is not known.
    """
    batch = recipe.optim.batch_size
    if processes < 1 or batch % processes:
        raise UserError(
            f"optim.batch_size {batch} does not divide among {processes} processes.",
            "The batch size is that of all processes together; choose a divisor.",
        )
    if not 0 < mfu <= 1:
        raise UserError(f"mfu {mfu} is not in (0, 1]: it is a share of the card's peak.")
    models = find_models(recipe)
    used = recipe.data.count or math.ceil(images * (recipe.data.fraction or 1.0))
    share = batch // processes
    micro = min(recipe.runtime.micro_batch_size or share, share)
    steps = recipe.optim.steps or max(1, math.floor(used // batch * (recipe.optim.epochs or 0)))
    is_projection = recipe.method == "projection"
    flops = _flops(recipe, models, micro=micro, is_cut=micro < share)
    heads = 0 if is_projection else _head_parameters(recipe, models)
    trained = 0 if is_projection else models.student_sizes.parameters + heads
    return AlignmentPlan(
        student=models.student.name,
        teachers=tuple(teacher.name for teacher in models.teachers),
        card=card,
        processes=processes,
        images_per_device=share,
        micro_batch_size=micro,
        steps=0 if is_projection else steps,
        images=used,
        parameters={"student": models.student_sizes.parameters, "trained": trained},
        memory=device_memory(recipe, models, share=share, micro=micro, heads=heads),
        gflops_per_image={name: value / 1e9 for name, value in flops.items()},
        hours=_hours(
            recipe,
            flops,
            seen=used if is_projection else steps * batch,
            used=used,
            rate=processes * card.flops_per_second(recipe.runtime.precision) * mfu,
            decoded=processes * max(1, recipe.data.workers) * images_per_core,
        ),
        cache_bytes=_cache_bytes(recipe, models, used) if recipe.targets.cache else 0,
        # Weights and two moments; the best one is kept beside the last ones.
        checkpoint_bytes=12 * trained * (recipe.checkpoint.keep + 1),
        assumptions=_assumptions(recipe, card, mfu=mfu, images_per_core=images_per_core),
    )


def plan_for_recipe(
    recipe: AlignRecipe, *, card: str = "rtx4090", processes: int = 1
) -> AlignmentPlan:
    """Plan a run on a card named as on the command line; see `plan_alignment`."""
    return plan_alignment(recipe, card=find_card(card), processes=processes)


def _flops(recipe: AlignRecipe, models: Models, *, micro: int, is_cut: bool) -> dict[str, int]:
    """Return the FLOPs per image by part of the step; "cache" comes once per image."""
    original = inference_flops(models.student, models.student.image_size)
    teachers = sum(
        inference_flops(teacher, size)
        for teacher, size in zip(models.teachers, models.teacher_image_sizes, strict=True)
    )
    if recipe.method == "projection":
        return {"teachers forward": teachers, "original forward": original}
    counts = training_counts(
        models.student,
        images=micro,
        precision=recipe.runtime.precision,
        checkpointing=recipe.runtime.gradient_checkpointing,
        patches=patch_work(recipe, models),
    )
    flops = {
        "student forward": counts.forward_flops // micro,
        "student backward": counts.backward_flops // micro,
    }
    if is_cut:
        flops["student forward again (micro-batches)"] = original
    if runs_teachers(recipe):
        flops["teachers forward"] = teachers
    if runs_original(recipe):
        flops["original forward"] = original
    if recipe.targets.cache:
        flops["once: target cache"] = teachers + original
    return flops


def _head_parameters(recipe: AlignRecipe, models: Models) -> int:
    """Return the size of trained maps and heads (`kuea_mllm.objectives`)."""
    objective, student = recipe.objective, models.student_sizes
    total = 0
    if objective.feature_weight:
        total += student.width * models.teacher_sizes[0].width
    if objective.distill_weight:
        widths = [student.width, *(t.width for t in models.teacher_sizes)]
        total += sum(_head_size(student.width, width) for width in widths)
    if objective.patch_distill_weight:
        widths = [student.token_width, *(t.token_width for t in models.teacher_sizes)]
        total += sum(_head_size(student.token_width, width) for width in widths)
    return total


def _head_size(width: int, target: int) -> int:
    return (width + 1) * width + (width + 1) * target


def _hours(
    recipe: AlignRecipe, flops: dict[str, int], *, seen: int, used: int, rate: float, decoded: float
) -> Hours:
    once = flops.get("once: target cache", 0)
    computed = rate / (sum(flops.values()) - once)
    speed = min(computed, decoded)
    caching = min(rate / once, decoded) if once else math.inf
    return Hours(
        training=seen / speed / 3600,
        targets=used / caching / 3600,
        images_per_second=speed,
        bound="decode" if decoded < computed else "compute",
    )


def _cache_bytes(recipe: AlignRecipe, models: Models, images: int) -> int:
    # A projection gives bfloat16 under autocast, a final norm float32.
    ends_in_product = models.student.has_projection and recipe.runtime.precision == "bf16"
    original = models.student_sizes.width * (2 if ends_in_product else 4)
    return images * (original + sum(4 * t.width for t in models.teacher_sizes))


def _assumptions(
    recipe: AlignRecipe, card: Card, *, mfu: float, images_per_core: float
) -> tuple[str, ...]:
    peak = card.flops_per_second(recipe.runtime.precision) / 1e12
    workers = max(1, recipe.data.workers)
    return (
        f"{mfu:.0%} of the {card.name}'s {recipe.runtime.precision} peak of {peak:g} TFLOP/s",
        f"{workers} decoding processes per device, {images_per_core:g} images/s each",
        "memory of the eager step; what torch.compile saves is not counted",
        f"{card.name}: {card.gib:g} GiB, as torch reports it",
    )
