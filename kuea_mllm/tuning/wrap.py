"""Puts LoRA layers into a loaded model: the language model's linear layers, and nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.config.lora import LoraConfig
from kuea_mllm.errors import UserError


def wrap_with_lora(
    model: nn.Module, parts: TuningParts, config: LoraConfig, *, uses_autocast: bool = False
) -> Any:
    """Return a `peft.PeftModel` around a model whose weights are all frozen.

    The projector and the output layer, where they are trained, are trained as a whole, as PEFT's
    `modules_to_save`: the original weights stay beside them, and one PEFT directory holds it all.
    Whatever is trained is float32, whatever the model is.

    Args:
        model: Loaded or empty; changed in place.
        parts: Where its parts are.
        config: Resolved.
        uses_autocast: Whether the model runs under autocast.

    Raises:
        UserError: If a target is not there, or the output layer is to be trained and is the
            embedding too.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.requires_grad_(False)
    whole = [*(parts.projector if config.projector == "train" else ())]
    if config.train_lm_head:
        _require_own_head(model, parts)
        whole.append(parts.output_head)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        bias="none",
        # Full paths: PEFT would match a bare name in the tower too.
        target_modules=list(linear_targets(model, parts, config.targets)),
        modules_to_save=whole or None,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks for a property that transformers 5 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        wrapped = peft.get_peft_model(model, settings)
    layers: list[Any] = [m for m in wrapped.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        # Under autocast the input of a LoRA layer is cast to float32 and back for nothing.
        layer.cast_input_dtype_enabled = not uses_autocast
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return wrapped


def _require_own_head(model: Any, parts: TuningParts) -> None:
    head: Any = model.get_submodule(parts.output_head)
    if head.weight is model.get_input_embeddings().weight:
        raise UserError(
            "key 'lora.train_lm_head' is true, and the output layer of this model is its embedding "
            "too, which PEFT would tear apart.",
            "Set lora.train_lm_head=false.",
        )
