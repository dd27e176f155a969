"""Which tokens of its tower each model class of transformers reads (no torch).

Keyed by the class that holds the tower, since its `get_image_features` does the reading: wrappers
of it (ColPali and pi0 around PaliGemma) read the same. Each entry was taken from the class in
transformers 5.23 (`models/<model>/modeling_<model>.py`) and is compared with what its projector
really gets in `tests/adapters/test_hf_vlm_taps.py`. A class that is not here has an unknown tap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kuea_mllm.adapters.base import Tap
from kuea_mllm.adapters.projector import ProjectorInput

Reading = Callable[[Any, str], Tap]


@dataclass(frozen=True)
class Reader:
    """How one model class reads its tower.

    Attributes:
        tap: Gives the tap from the class's configuration and the tower's family.
        projector: Gives the weight that shows the width of the projector's input.
        attribute: The tower for images; decides where the class holds a second one for videos.
    """

    tap: Reading
    projector: Callable[[Any], ProjectorInput]
    attribute: str = "vision_tower"


def _layers(config: Any) -> tuple[int, ...]:
    chosen = config.vision_feature_layer
    return (chosen,) if isinstance(chosen, int) else tuple(chosen)


def _selected(config: Any, family: str) -> Tap:
    # `hidden_states` of the tower, the first token cut off by the strategy "default" whatever it
    # is: with SigLIP, which has no class token, that is the first patch.
    return Tap(_layers(config), drops_cls=config.vision_feature_select_strategy == "default")


def _selected_without_first(config: Any, family: str) -> Tap:
    return Tap(_layers(config), drops_cls=True)


def _last(config: Any, family: str) -> Tap:
    # `last_hidden_state`: SigLIP's has been through post_layernorm, CLIP's has not.
    return Tap((-1,), drops_cls=False, after_norm=family == "siglip")


def _deepstack(config: Any, family: str) -> Tap:
    layers = [layer for layer, _ in config.deepstack_layer_map or ()]
    chosen = dict.fromkeys([*layers, config.spatial_vision_layer])
    return Tap(tuple(chosen), drops_cls=config.vision_feature_select_strategy == "default")


def _llava(config: Any) -> ProjectorInput:
    return ProjectorInput("multi_modal_projector.linear_1.weight", 1, len(_layers(config)))


def _pixel_shuffle(config: Any) -> ProjectorInput:
    return ProjectorInput("multi_modal_projector.linear_1.weight", 1, config.downsample_factor**2)


def _connector(config: Any) -> ProjectorInput:
    return ProjectorInput("connector.modality_projection.weight", 1, config.pixel_shuffle_factor**2)


def _weight(name: str, axis: int = 1) -> Callable[[Any], ProjectorInput]:
    return lambda config: ProjectorInput(name, axis)


_GEMMA = _weight("multi_modal_projector.mm_input_projection_weight", axis=0)

READERS: dict[str, Reader] = {
    "AyaVisionModel": Reader(_selected, _pixel_shuffle),
    "Cohere2VisionModel": Reader(_last, _pixel_shuffle),
    "DeepseekVLHybridModel": Reader(_last, _weight("aligner.vision_proj.weight"), "vision_model"),
    "DeepseekVLModel": Reader(_last, _weight("aligner.linear1.weight"), "vision_model"),
    "Gemma3Model": Reader(_last, _GEMMA),
    "Granite4VisionModel": Reader(_deepstack, _weight("layerwise_projectors.0.norm.weight", 0)),
    "LlavaModel": Reader(_selected, _llava),
    "LlavaNextModel": Reader(_selected, _llava),
    "LlavaNextVideoModel": Reader(_selected, _llava),
    "LlavaOnevisionModel": Reader(_selected, _llava),
    "ModernVBertModel": Reader(_last, _connector, "vision_model"),
    "PaliGemmaModel": Reader(_last, _weight("multi_modal_projector.linear.weight")),
    "T5Gemma2Encoder": Reader(_last, _GEMMA),
    "UltraVBertModel": Reader(_last, _connector, "vision_model"),
    "VideoLlavaModel": Reader(_selected, _llava, "image_tower"),
    "VipLlavaModel": Reader(_selected_without_first, _llava),
}
