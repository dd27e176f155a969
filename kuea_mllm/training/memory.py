"""A training and the memory there is: how to need less, and what to say when it was not enough."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from kuea_mllm.errors import EnvironmentFailure
from kuea_mllm.log import LOGGER

# Of CUDA's own calls, of libraries above it, and of torch on the CPU: all plain errors.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+|\d+ bytes)")


def recompute_activations(module: nn.Module) -> None:
    """Turn on gradient checkpointing of a transformers model."""
    model: Any = module
    # Non-reentrant: the other kind loses gradients where the input needs none, as pixels do.
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # transformers before it was renamed
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    LOGGER.info("activations are computed again in the backward pass (gradient_checkpointing)")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that device or host have no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def out_of_memory(error: BaseException, doing: str, remedy: str) -> EnvironmentFailure:
    """Return the error as a line: what ran out, and what to change.

    Args:
        error: For which `is_out_of_memory` holds.
        doing: Where it happened, as "on cuda while tuning MODEL".
        remedy: Names the settings that need less.
    """
    asked = _ASKED.search(str(error))
    more = f" ({asked[1]} more were asked for)" if asked else ""
    return EnvironmentFailure(f"out of memory {doing}{more}.", remedy)
