"""Adapters: what the toolkit has to know about one multimodal model (MLLM) each.

The core knows no MLLM by name. An adapter is a small package that offers an `AdapterManifest`
through the entry-point group `kuea_mllm.adapters`; `registry` finds it, `base` says what it has to
provide, `conformance` checks a new one. Listing adapters imports neither torch nor transformers.
"""

from __future__ import annotations

from kuea_mllm.adapters.base import (
    AdapterManifest,
    ChatRequest,
    MLLMAdapter,
    MLLMExporter,
    MLLMImporter,
    MLLMPartsImporter,
    MLLMRuntime,
    Tap,
    TowerReference,
    TowerSlot,
)

__all__ = [
    "AdapterManifest",
    "ChatRequest",
    "MLLMAdapter",
    "MLLMExporter",
    "MLLMImporter",
    "MLLMPartsImporter",
    "MLLMRuntime",
    "Tap",
    "TowerReference",
    "TowerSlot",
]
