"""LLaVA-1.5 in its Hugging Face form (`LlavaForConditionalGeneration`)."""

from __future__ import annotations

from kuea_mllm.adapters.base import AdapterManifest

MANIFEST = AdapterManifest(
    name="llava",
    summary="LLaVA-1.5 (7B, 13B; 224 or 336 px) in Hugging Face form",
    factory="kuea_mllm.adapters.llava.adapter:LlavaAdapter",
)
