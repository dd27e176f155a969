"""Memory of one device, part by part."""

from __future__ import annotations

from kuea_mllm.cards import GIB
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.planning.models_of_recipe import Models, patch_work, runs_original, runs_teachers
from kuea_mllm.planning.result import MemoryPart
from kuea_mllm.planning.towers import inference_peak, training_counts

_CONTEXT_BYTES = int(0.75 * GIB)  # CUDA context, cuBLAS and NCCL workspaces
_ALLOCATOR_SHARE = 0.03  # rounding and fragmentation of the caching allocator


def device_memory(
    recipe: AlignRecipe, models: Models, *, share: int, micro: int, heads: int
) -> tuple[MemoryPart, ...]:
    """Return the memory of one device at the worst moment of a step, part by part.

    Args:
        recipe: What is run.
        models: Its student and teachers.
        share: Images of the batch on one device.
        micro: Images embedded at once.
        heads: Trained parameters beside the tower.
    """
    student, runtime, batch = models.student_sizes, recipe.runtime, recipe.optim.batch_size
    frozen = _frozen_memory(recipe, models)
    side = models.student.image_size
    # uint8 as it travels and float32 in [0, 1] for the share; normalised for what is run at once.
    pixels = 3 * side**2 * (share * 5 + micro * 4)
    if recipe.method == "projection":
        gram = 8 * models.teacher_sizes[0].width * (models.teacher_sizes[0].width + student.width)
        working = max(
            inference_peak(model, size, images=share)
            for model, size in zip(
                (models.student, *models.teachers),
                (side, *models.teacher_image_sizes),
                strict=True,
            )
        )
        return with_allowance(
            [
                *frozen,
                MemoryPart("working space", working, f"forward pass of {share} images, counted"),
                MemoryPart("least squares", gram, "float64 sums over images"),
                MemoryPart("pixels", pixels, f"{share} images"),
            ]
        )
    counts = training_counts(
        models.student,
        images=micro,
        precision=runtime.precision,
        checkpointing=runtime.gradient_checkpointing,
        patches=patch_work(recipe, models),
    )
    trained = student.parameters + heads
    widths = student.width * 2 + sum(t.width for t in models.teacher_sizes)
    targets = 4 * batch * widths + 4 * share * _target_tokens(recipe, models)
    parts = [
        MemoryPart("weights", 4 * trained, "float32 master weights of what is trained"),
        MemoryPart("gradients", 4 * trained, "float32"),
        MemoryPart("AdamW moments", 8 * trained, "two float32 numbers per weight"),
    ]
    parts += [
        *frozen,
        MemoryPart("weight copies", counts.weight_copy_bytes, "bfloat16, made by autocast"),
        MemoryPart(
            "activations",
            counts.activation_bytes,
            f"kept for the backward pass of {micro} images, counted"
            + (" (block inputs only)" if runtime.gradient_checkpointing else ""),
        ),
        MemoryPart("working space", counts.working_bytes, "the worst moment above that, counted"),
        MemoryPart("targets", targets, "embeddings of the whole batch; patch tokens of the share"),
        # Student and teacher matrix with their intermediate results, and the gradients of these.
        MemoryPart("kernel matrices", 4 * 16 * batch**2, f"{batch} x {batch}"),
        MemoryPart("pixels", pixels, f"{share} images"),
    ]
    return with_allowance(parts)


def _frozen_memory(recipe: AlignRecipe, models: Models) -> list[MemoryPart]:
    found = []
    if runs_original(recipe):
        found.append(
            MemoryPart("original tower", 4 * models.student_sizes.parameters, "frozen, float32")
        )
    if runs_teachers(recipe):
        size = 4 * sum(t.parameters for t in models.teacher_sizes)
        found.append(MemoryPart("teachers", size, "frozen, float32"))
    return found


def _target_tokens(recipe: AlignRecipe, models: Models) -> int:
    """Return the numbers in the patch tokens that one image is compared with."""
    if not recipe.objective.has_patch_terms:
        return 0
    total = models.student_sizes.patches * models.student_sizes.token_width
    if recipe.objective.patch_kernel_weight or recipe.objective.patch_distill_weight:
        total += sum(t.patches * t.token_width for t in models.teacher_sizes)
    return total


def with_allowance(parts: list[MemoryPart]) -> tuple[MemoryPart, ...]:
    """Return the parts that take anything, and what is assumed on top of them."""
    counted = sum(part.bytes for part in parts)
    allowance = _CONTEXT_BYTES + int(_ALLOCATOR_SHARE * counted)
    reason = "assumed: 0.75 GiB for CUDA context and workspaces, 3 % for the allocator"
    return (*(p for p in parts if p.bytes), MemoryPart("allowance", allowance, reason))
