"""Any Hugging Face vision language model whose vision tower is of the CLIP or SigLIP family."""

from __future__ import annotations

from kuea_mllm.adapters.base import AdapterManifest

MANIFEST = AdapterManifest(
    name="hf_vlm",
    summary="any other Hugging Face VLM with a CLIP or SigLIP tower (LLaVA-NeXT, PaliGemma, ...)",
    factory="kuea_mllm.adapters.hf_vlm.adapter:HFVLMAdapter",
    is_fallback=True,
)
