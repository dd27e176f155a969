"""Settings of `accelerate launch` that would change a training behind its recipe's back.

accelerate passes its configuration on by environment variables, which `transformers.Trainer` obeys:
one that was written for another project is enough. Number of processes and devices is all that is
taken from it here.
"""

from __future__ import annotations

import os

from kuea_mllm.errors import UserError

_NO = frozenset({"", "no", "false", "0"})
# What each would do, and what to set instead.
_REFUSED = {
    "ACCELERATE_USE_FSDP": (
        "which would also divide what is trained",
        "Use one with distributed_type: MULTI_GPU; `kuea-mllm lora` divides frozen weights by "
        "runtime.sharding=fsdp.",
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "which would take over optimiser and checkpoints",
        "Use one with distributed_type: MULTI_GPU.",
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "which knows none of these models",
        "Use one with distributed_type: MULTI_GPU.",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "which would divide the batch in another way",
        "Use one with distributed_type: MULTI_GPU.",
    ),
    "ACCELERATE_MIXED_PRECISION": (
        "which would round where the recipe does not",
        "Use mixed_precision: no; the recipe states the precision.",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (
        "which would compile the model",
        "Use dynamo_backend: no; the recipe states whether to compile.",
    ),
}


def refuse_foreign_settings() -> None:
    """Refuse to train under a configuration of accelerate that changes the training.

    Raises:
        UserError: Names the setting.
    """
    for variable, (problem, remedy) in _REFUSED.items():
        value = os.environ.get(variable, "")
        if value.lower() not in _NO:
            raise UserError(
                f"accelerate's configuration sets {variable}={value}, {problem}.", remedy
            )
