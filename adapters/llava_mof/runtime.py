"""Answers questions with mixed image tokens; the prompts and the decoding are LLaVA-1.5's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kuea_mllm.adapters.llava.images import padded_images
from kuea_mllm.adapters.llava.runtime import LlavaRuntime
from kuea_mllm.adapters.llava_mof.adapter import resolve_config
from kuea_mllm.adapters.loading import failures_named, load_model, resolve_device, resolve_dtype


class LlavaMofRuntime(LlavaRuntime):
    """A loaded LLaVA-1.5 with mixed image tokens."""

    def describe(self) -> dict[str, Any]:
        """Say how the model runs, and what it mixes."""
        config = self.model.config
        return {
            **super().describe(),
            "clip_share": float(config.clip_share),
            "expert": str(config.expert_config.model_type),
            "expert_feature_layer": int(config.expert_feature_layer),
        }


def open_runtime(model_dir: Path, *, dtype: str, device: str) -> LlavaMofRuntime:
    """Load a directory exactly as asked, with no other dtype or device as a fallback.

    Raises:
        UserError: If the directory, the dtype or the device is not usable.
        EnvironmentFailure: If the device is too small.
    """
    from transformers import AutoTokenizer

    from kuea_mllm.adapters.llava_mof.modeling import LlavaMofForConditionalGeneration

    config = resolve_config(model_dir)
    images = padded_images(model_dir, config.vision_config.image_size)
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    with failures_named(model_dir, torch_device):
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        model = load_model(
            LlavaMofForConditionalGeneration, model_dir, dtype=torch_dtype, device=torch_device
        )
    return LlavaMofRuntime(model, tokenizer, images, str(model_dir))
