"""What an alignment is, for a run that goes on with it: recipe and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from kuea_mllm.alignment.inputs import AlignmentInputs
from kuea_mllm.alignment.target_cache import original_embedder
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.errors import RecipeError, UserError
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.training.distributed import world_size
from kuea_mllm.training.run_directory import DROP, RunIdentity

KIND = "alignment"

# What a resumed run may change. Speed and bookkeeping (the last three change rounding at most), and
# places, since the content of what lies there is compared by itself (inputs.json).
FREE_KEYS = (
    "data.workers",
    "runtime.log_every",
    "runtime.trackers",
    "checkpoint",
    "targets.directory",
    "student.model",
    "student.revision",
    "teacher.model",
    "teacher.revision",
    "data.images",
    "data.heldout",
    "runtime.compile",
    "runtime.gradient_checkpointing",
    "runtime.micro_batch_size",
)


def identify_run(inputs: AlignmentInputs) -> RunIdentity:
    """Return what a run on these inputs is recognised by."""
    recipe = inputs.recipe
    return RunIdentity(
        recipe=recipe,
        kind=KIND,
        keep=recipe.checkpoint.keep,
        fingerprints=partial(_input_fingerprints, inputs),
        is_free=partial(is_free_key, recipe=recipe),
        check=partial(_require_same_readers, recipe),
    )


def is_free_key(key: str, recipe: AlignRecipe) -> bool:
    """Return whether a resumed run may differ in a key of the recipe."""
    if key == "runtime.measure_every":
        return recipe.monitor.early_stop is None  # which counts measurements
    if key.startswith("extra_teachers."):
        return key.endswith((".model", ".revision"))
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _input_fingerprints(inputs: AlignmentInputs) -> dict[str, str]:
    # Of the whole student: a tower's own fingerprint leaves out its projection.
    student = original_embedder(TowerEncoder(inputs.student), description="").fingerprint
    teachers = {
        f"teacher {number}" if number else "teacher": teacher.fingerprint
        for number, teacher in enumerate(inputs.teachers)
    }
    heldout: Any = inputs.images.heldout
    return {
        "student": student,
        **teachers,
        "list of training images": inputs.images.listing,
        "list of held-out images": heldout.source.fingerprint(),
    }


def _require_same_readers(
    recipe: AlignRecipe, state: Mapping[str, Any], changed: Mapping[str, tuple[Any, Any]]
) -> None:
    # The order of a stream depends on who reads it.
    if not recipe.data.stream:
        return
    if "data.workers" in changed:
        old, new = changed["data.workers"]
        raise RecipeError(
            f"--resume: key 'data.workers' is {new}, and the unfinished run was started with "
            f"{old}, on which the order of a stream depends.",
            DROP,
        )
    if state["processes"] != world_size():
        raise UserError(
            f"--resume: the unfinished run had {state['processes']} processes, this one has "
            f"{world_size()}, and the order of a stream depends on it.",
            "Start as many as before, or drop the unfinished run with --restart.",
        )
