"""OpenFlamingo-3B and its Instruct variant on today's libraries.

The original runs on transformers up to 4.30 only and, beside a current open_clip, is fed features
it was never trained on. `modeling` is a transformers model of its own; `registration.register`
makes the Auto classes know it; `convert` brings the released files to its form and back.
"""

from __future__ import annotations

from kuea_mllm.adapters.base import AdapterManifest

MANIFEST = AdapterManifest(
    name="openflamingo",
    summary="OpenFlamingo-3B (MPT-1B, base and Instruct) in the Hugging Face form of this package",
    factory="kuea_mllm.adapters.openflamingo.adapter:OpenFlamingoAdapter",
)
