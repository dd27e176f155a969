"""What a tuning is, for a run that goes on with it: recipe and inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from kuea_mllm.errors import RecipeError
from kuea_mllm.training.distributed import world_size
from kuea_mllm.training.run_directory import RunIdentity
from kuea_mllm.tuning.inputs import TuningInputs

KIND = "tuning"

# What a resumed run may change: speed and bookkeeping, and places, since the content of what lies
# there is compared by itself (inputs.json).
FREE_KEYS = (
    "model.path",
    "data.file",
    "data.images",
    # What a run has learned from a record stays; from now on it learns nothing more from it.
    "data.skip_records",
    "data.workers",
    "runtime.log_every",
    "runtime.trackers",
    "runtime.gradient_checkpointing",
    "runtime.loss_chunk",
    "runtime.sharding",
    "runtime.check_memory",
    "checkpoint",
)


def identify_run(inputs: TuningInputs) -> RunIdentity:
    """Return what a run on these inputs is recognised by."""
    return RunIdentity(
        recipe=inputs.recipe,
        kind=KIND,
        keep=inputs.recipe.checkpoint.keep,
        fingerprints=partial(_fingerprints, inputs),
        is_free=is_free_key,
        check=partial(_require_same_dropout, inputs),
    )


def is_free_key(key: str) -> bool:
    """Return whether a resumed run may differ in a key of the recipe."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _fingerprints(inputs: TuningInputs) -> dict[str, str]:
    identity = json.dumps(inputs.identity, sort_keys=True).encode()
    return {
        "model": hashlib.sha256(identity).hexdigest(),
        # Named after the checksum of the file.
        "data file": inputs.mixture.folder.name,
    }


def _require_same_dropout(
    inputs: TuningInputs, state: Mapping[str, Any], changed: Mapping[str, Any]
) -> None:
    """Refuse another number of processes where each draws random numbers of its own."""
    if inputs.recipe.lora.dropout and state["processes"] != world_size():
        raise RecipeError(
            f"--resume: the unfinished run had {state['processes']} processes, this one has "
            f"{world_size()}, and each draws the dropout of its own samples.",
            "Start as many as before, or drop the unfinished run with --restart.",
        )
