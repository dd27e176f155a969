"""Where the vision tower of a base model sits, and how the MLLM reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Where a swap puts the tower of a model that only names one, inside of the model's directory.
# SGLang takes a named tower only if its path contains "clip" or "siglip".
NAMED_TOWER_DIRECTORY = "clip_vision_tower"


@dataclass(frozen=True)
class Tap:
    """Which tokens of the tower an MLLM reads.

    Attributes:
        layers: Indices into `hidden_states`, negative from the end: 0 is the input of the first
            block, -1 the output of the last. Several are joined along the width or read one by one.
        drops_cls: Whether the first token is left out: the class token, where the family has one.
        after_norm: Whether the final norm (`post_layernorm`) is applied to what is read.
    """

    layers: tuple[int, ...]
    drops_cls: bool
    after_norm: bool = False


@dataclass(frozen=True)
class TowerReference:
    """A tower that a base keeps elsewhere: its configuration names it, its loader fetches it.

    Attributes:
        file: Configuration file, relative to the model directory.
        key: Key in it, such as "mm_vision_tower".
        value: What it says: a Hub id or a path.
    """

    file: str
    key: str
    value: str


@dataclass(frozen=True)
class TowerSlot:
    """Where the vision tower of one base model sits and how it is read.

    Attributes:
        vision_config: The tower's configuration as the base model builds it, defaults filled in
            (keys as in `transformers.CLIPVisionConfig`).
        module: Dotted path of the tower in a loaded model ("model.vision_tower"). On disk the tower
            is found by the names and shapes of all its tensors; the path only decides between two
            towers of the same shape.
        tap: Which of its tokens the MLLM reads, None if that is not known.
        family: Tower family the slot takes, as in `TowerSpec.family` ("clip", "siglip").
        mean: Channel means the base normalises images with, or None if it does not say.
        std: Channel deviations likewise.
        projector_width: Width of the tower tokens that the projector was made for, read off its
            weights; of one of them, where it takes several joined. None if that is not known.
        reference: Set where the configuration names a tower that its loader takes from elsewhere,
            whatever the weight files hold.
    """

    vision_config: Mapping[str, Any]
    module: str
    tap: Tap | None
    family: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    projector_width: int | None = None
    reference: TowerReference | None = None
