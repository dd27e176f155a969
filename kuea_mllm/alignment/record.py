"""What a finished run says about itself in `kuea.json`."""

from __future__ import annotations

from typing import Any

from kuea_mllm.alignment.inputs import AlignmentInputs
from kuea_mllm.manifest import (
    SCHEMA_VERSION,
    current_command,
    library_versions,
    named_source,
    utc_now,
)


def describe_run(
    inputs: AlignmentInputs, *, kernel: dict[str, Any], measured: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Return the manifest of an aligned tower.

    Args:
        inputs: What was read.
        kernel: Constants of the student's kernel, initial and final.
        measured: Held-out measurements, before and after.
        more: Further entries: processes, why the run ended, images left out.
    """
    recipe, student, images = inputs.recipe, inputs.student, inputs.images
    configs = (recipe.teacher, *recipe.extra_teachers)
    teachers = [
        {
            **named_source(str(config.model)),
            "fingerprint": teacher.fingerprint,
            "readout": config.readout,
            "normalisation": config.normalisation,
            "image_size": teacher.image_size,
        }
        for config, teacher in zip(configs, inputs.teachers, strict=True)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "tower",
        "base_tower": {
            **named_source(str(recipe.student.model)),
            "revision": recipe.student.revision,
            "layout": student.layout,
            "fingerprint": inputs.base_fingerprints["float32"],
            # Under each rounding, so that the tower is recognised in an MLLM's half precision.
            "fingerprints": dict(inputs.base_fingerprints),
        },
        "teacher": teachers[0],
        "extra_teachers": teachers[1:],
        "objective": recipe.objective.model_dump(mode="json"),
        "kernel": kernel,
        "compat": recipe.compat,
        "optim": recipe.optim.model_dump(mode="json"),
        "runtime": recipe.runtime.model_dump(mode="json"),
        "data": {
            "images": str(recipe.data.images),
            "trained_on": images.count,
            "listing": images.listing,
            "augment": recipe.data.augment,
            "heldout": recipe.data.heldout or "taken out of the training images",
        },
        "heldout": measured,
        **more,
        "versions": library_versions(),
        "command": current_command(),
        "created": utc_now(),
    }
