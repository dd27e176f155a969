"""The models that a recipe names, and which of them a step runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kuea_mllm.config.align import AlignRecipe, TeacherConfig
from kuea_mllm.errors import RecipeError
from kuea_mllm.planning.models import Architecture, find_architecture
from kuea_mllm.planning.towers import PatchWork, TowerSizes, tower_sizes


@dataclass(frozen=True)
class Models:
    """Architectures and shapes that a recipe names."""

    student: Architecture
    student_sizes: TowerSizes
    teachers: tuple[Architecture, ...]
    teacher_sizes: tuple[TowerSizes, ...]
    teacher_image_sizes: tuple[int, ...]


def find_models(recipe: AlignRecipe) -> Models:
    """Find the architectures that a recipe names; reads no weights.

    Raises:
        UserError: If a model is not set or not known.
    """
    student = find_architecture(_named(recipe.student.model, "student.model"), role="student.model")
    configs = (recipe.teacher, *recipe.extra_teachers)
    teachers = tuple(
        find_architecture(_named(config.model, "teacher.model"), role="teacher.model")
        for config in configs
    )
    sizes = tuple(
        config.image_size or teacher.image_size
        for config, teacher in zip(configs, teachers, strict=True)
    )
    return Models(
        student=student,
        student_sizes=tower_sizes(student, student.image_size),
        teachers=teachers,
        teacher_sizes=tuple(
            _read_out(tower_sizes(teacher, size), config)
            for teacher, size, config in zip(teachers, sizes, configs, strict=True)
        ),
        teacher_image_sizes=sizes,
    )


def _read_out(sizes: TowerSizes, config: TeacherConfig) -> TowerSizes:
    return sizes if config.readout == "pooled" else replace(sizes, width=sizes.token_width)


def _named(model: str | None, key: str) -> str:
    if model is None:
        raise RecipeError(f"key '{key}' is not set.", f"Set it with --set {key}=NAME.")
    return model


def patch_work(recipe: AlignRecipe, models: Models) -> PatchWork | None:
    """Return the patch terms of a recipe, None if it has none."""
    objective = recipe.objective
    if not objective.has_patch_terms:
        return None
    return PatchWork(
        layer=objective.patch_layer,
        preserve=bool(objective.patch_preserve_weight),
        kernel=bool(objective.patch_kernel_weight),
        distill=bool(objective.patch_distill_weight),
        teachers=tuple((t.patches, t.token_width) for t in models.teacher_sizes),
    )


def runs_original(recipe: AlignRecipe) -> bool:
    """Return whether a step runs the frozen original tower."""
    # Patch tokens are not cached: 576 of them per image would be terabytes.
    return not recipe.targets.cache or recipe.objective.has_patch_terms


def runs_teachers(recipe: AlignRecipe) -> bool:
    """Return whether a step runs the teachers."""
    objective = recipe.objective
    reads_patches = objective.patch_kernel_weight or objective.patch_distill_weight
    return not recipe.targets.cache or bool(reads_patches)
