"""A frozen language model in four or eight bits, by bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal

import torch

from kuea_mllm.adapters.base import TuningParts


def quantization_config(
    kind: Literal["none", "nf4", "int8"], parts: TuningParts, *, dtype: torch.dtype
) -> Any:
    """Return what `MLLMTuner.load_for_tuning` takes, None for no quantisation.

    Only the language model's linear layers are quantised. Tower and projector are what this project
    is about, and the output layer is read directly by the loss.

    Args:
        kind: nf4: four bits with quantised constants, as QLoRA. int8: as LLM.int8().
        parts: Where the parts of the model are.
        dtype: Of the arithmetic.
    """
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    kept = [*parts.whole, *parts.excluded]
    if kind == "int8":
        return make(load_in_8bit=True, llm_int8_skip_modules=kept)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
