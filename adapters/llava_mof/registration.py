"""Makes transformers know LLaVA with mixed image tokens; called, never done by an import."""

from __future__ import annotations


def register() -> None:
    """Register configuration, model and the names of its weights on disk (repeatable).

    A directory keeps the names that its LLaVA has, which transformers renames while loading by a
    table for the model type; the mixed model has the same names and one more encoder.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    from kuea_mllm.adapters.llava_mof.configuration import LlavaMofConfig
    from kuea_mllm.adapters.llava_mof.modeling import (
        LlavaMofForConditionalGeneration,
        LlavaMofModel,
    )

    AutoConfig.register(LlavaMofConfig.model_type, LlavaMofConfig, exist_ok=True)
    AutoModelForImageTextToText.register(
        LlavaMofConfig, LlavaMofForConditionalGeneration, exist_ok=True
    )
    AutoProcessor.register(  # type: ignore[no-untyped-call]
        LlavaMofConfig, LlavaProcessor, exist_ok=True
    )
    for name, like in (
        (LlavaMofConfig.model_type, "llava"),
        (LlavaMofModel.__name__, "LlavaModel"),
    ):
        mapping = get_checkpoint_conversion_mapping(like)  # type: ignore[no-untyped-call]
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
