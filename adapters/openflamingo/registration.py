"""Makes transformers' Auto classes know OpenFlamingo; called, never done by an import."""

from __future__ import annotations


def register() -> None:
    """Register configuration, model and processor with transformers' Auto classes (repeatable)."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from kuea_mllm.adapters.openflamingo.configuration import (
        OpenFlamingoConfig,
        OpenFlamingoTextConfig,
    )
    from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
    from kuea_mllm.adapters.openflamingo.processing import (
        OpenFlamingoImageProcessor,
        OpenFlamingoProcessor,
    )

    for config in (OpenFlamingoConfig, OpenFlamingoTextConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForImageTextToText.register(
        OpenFlamingoConfig, OpenFlamingoForConditionalGeneration, exist_ok=True
    )
    AutoProcessor.register(  # type: ignore[no-untyped-call]
        OpenFlamingoConfig, OpenFlamingoProcessor, exist_ok=True
    )
    AutoImageProcessor.register(
        OpenFlamingoConfig,
        slow_image_processor_class=OpenFlamingoImageProcessor,
        exist_ok=True,
    )
