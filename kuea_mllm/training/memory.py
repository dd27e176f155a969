"""What makes a training smaller without changing what it computes."""

from __future__ import annotations

from typing import Any

from torch import nn

from kuea_mllm.log import LOGGER


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
