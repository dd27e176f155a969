"""What lmms-eval finds under the entry-point group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any

MODEL_ID = "kuea_mllm"
"""The name under which lmms-eval knows our model class (`lmms-eval --model kuea_mllm`)."""


def manifests() -> list[Any]:
    """Describe our model class to lmms-eval (a list of `ModelManifest`)."""
    # Not at module level: if this package were imported before lmms_eval.models, that would be a
    # circular import, and lmms-eval would drop the plugins of everybody with a single warning.
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=MODEL_ID, simple_class_path="kuea_mllm.evaluation.lmms.model.KueaMLLM"
        )
    ]
