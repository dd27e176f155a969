"""LoRA weights with random values for any tiny model, as files and as PEFT models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from kuea_mllm.adapters.base import MLLMTuner
from kuea_mllm.adapters.registry import adapter_for
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.tuning.base_identity import identify_base
from kuea_mllm.tuning.output import save_adapter


def load(base: Path, dtype: str = "float32", quantization: object | None = None) -> Any:
    """Load a model directory as it is tuned."""
    adapter = adapter_for(base)
    assert isinstance(adapter, MLLMTuner)
    return adapter.load_for_tuning(base, dtype=dtype, device="cpu", quantization=quantization)


def tune(
    base: Path,
    *,
    dtype: str = "float32",
    head: bool = False,
    projector: bool = True,
    quantization: object | None = None,
    **lora: Any,
) -> PeftModel:
    """A PEFT model whose every trained value differs from its start."""
    adapter = adapter_for(base)
    assert isinstance(adapter, MLLMTuner)
    parts = adapter.tuning_parts(base)
    model = load(base, dtype, quantization)
    whole = [*(parts.projector if projector else ()), *([parts.output_head] if head else [])]
    settings = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "task_type": "CAUSAL_LM",
            "target_modules": list(linear_targets(model, parts)),
            "modules_to_save": whole or None,
            **lora,
        }
    )
    peft_model = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                # The projector of a bfloat16 model too, as a tuning does.
                parameter.data = parameter.data.float()
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft_model.eval()


def save(model: PeftModel, base: Path, out: Path, *, reference: str | None = None) -> Path:
    """Write it as a tuning does."""
    adapter = adapter_for(base)
    identity = identify_base(base, adapter.tower_slot(base))
    manifest = {
        "adapter": adapter.name,
        "base": {"reference": reference or str(base), **identity},
        "lora": {"rank": 4, "alpha": 8},
    }
    save_adapter(model, out, manifest=manifest)
    return out
