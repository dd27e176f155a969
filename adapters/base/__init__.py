"""The contract between the toolkit and one multimodal model (no torch at import).

Authors of adapters import from here: `adapter` is what each of them has to provide, `slots` and
`runtimes` are what it speaks of; `releases` and `tuning` are offers on top; `manifest` makes an
adapter known.
"""

from __future__ import annotations

from kuea_mllm.adapters.base.adapter import MLLMAdapter
from kuea_mllm.adapters.base.manifest import AdapterManifest
from kuea_mllm.adapters.base.releases import (
    LoraConverter,
    MLLMExporter,
    MLLMImporter,
    MLLMPartsImporter,
)
from kuea_mllm.adapters.base.runtimes import (
    ChatRequest,
    ChoosingRuntime,
    FewShotRuntime,
    MLLMRuntime,
    PreprocessingRuntime,
)
from kuea_mllm.adapters.base.slots import NAMED_TOWER_DIRECTORY, Tap, TowerReference, TowerSlot
from kuea_mllm.adapters.base.tuning import (
    ConversationEncoder,
    EncodedSample,
    MLLMTuner,
    TuningFormat,
    TuningParts,
)

__all__ = [
    "NAMED_TOWER_DIRECTORY",
    "AdapterManifest",
    "ChatRequest",
    "ChoosingRuntime",
    "ConversationEncoder",
    "EncodedSample",
    "FewShotRuntime",
    "LoraConverter",
    "MLLMAdapter",
    "MLLMExporter",
    "MLLMImporter",
    "MLLMPartsImporter",
    "MLLMRuntime",
    "MLLMTuner",
    "PreprocessingRuntime",
    "Tap",
    "TowerReference",
    "TowerSlot",
    "TuningFormat",
    "TuningParts",
]
