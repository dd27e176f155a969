"""Answers questions with mixed image tokens; the prompts and the decoding are LLaVA-1.5's."""

from __future__ import annotations

from typing import Any

from kuea_mllm.adapters.llava.runtime import LlavaRuntime
from kuea_mllm.adapters.llava_mof.adapter import model_class


class LlavaMofRuntime(LlavaRuntime):
    """A loaded LLaVA-1.5 with mixed image tokens."""

    _model_class = staticmethod(model_class)

    def describe(self) -> dict[str, Any]:
        """Say how the model runs, and what it mixes."""
        config = self.model.config
        return {
            **super().describe(),
            "clip_share": float(config.clip_share),
            "expert": str(config.expert_config.model_type),
            "expert_feature_layer": int(config.expert_feature_layer),
        }
