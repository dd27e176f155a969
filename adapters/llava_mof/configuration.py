"""Configuration of LLaVA-1.5 with mixed image tokens."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import LlavaConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from kuea_mllm.errors import UserError
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD

MODEL_TYPE = "llava_mof"
EXPERTS = ("dinov2", "dinov2_with_registers")


class LlavaMofConfig(LlavaConfig):
    """LLaVA-1.5 with a second vision encoder beside its CLIP tower.

    Attributes:
        expert_config: The second encoder, a configuration of DINOv2 with or without registers.
        clip_share: Share of CLIP's token in an image token, in [0, 1]; DINOv2's is the rest.
        expert_feature_layer: Hidden state of the second encoder that is read, without final norm:
            -1 is the last block, as in the code of Tong et al.
        clip_mean: Channel means that pixel values come normalised with, those of the CLIP tower.
        clip_std: Channel deviations likewise.
        expert_mean: Channel means that the second encoder's pixels are normalised with; None takes
            CLIP's, as the code of Tong et al. does.
        expert_std: Channel deviations likewise.
    """

    model_type = MODEL_TYPE
    # The base class makes a dataclass of this one, so that all fields need types and defaults.
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
        "expert_config": AutoConfig,
    }

    expert_config: dict[str, Any] | PreTrainedConfig | None = None
    clip_share: float = 0.5
    expert_feature_layer: int = -1
    clip_mean: list[float] | None = None
    clip_std: list[float] | None = None
    expert_mean: list[float] | None = None
    expert_std: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the parts.

        Raises:
            UserError: If the second encoder is of another kind, or the share is out of range.
        """
        self.expert_config = _expert(self.expert_config)
        if not (math.isfinite(self.clip_share) and 0 <= self.clip_share <= 1):
            raise UserError(
                f"clip_share is {self.clip_share}; it must be between 0 (DINOv2 alone) and 1 "
                "(CLIP alone)."
            )
        self.clip_mean = self.clip_mean or list(CLIP_MEAN)
        self.clip_std = self.clip_std or list(CLIP_STD)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


def _expert(given: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    values = dict(given or {"model_type": EXPERTS[0]})
    kind = values.pop("model_type", EXPERTS[0])
    if kind not in EXPERTS:
        raise UserError(
            f"expert_config says model_type {kind!r}; the second encoder is one of "
            f"{', '.join(EXPERTS)}."
        )
    made: PreTrainedConfig = AutoConfig.for_model(kind, **values)
    return made
