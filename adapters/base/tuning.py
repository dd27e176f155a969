"""What an adapter may provide on top: tuning of its model's language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn


class EncodedSample(Protocol):
    """What a `ConversationEncoder` makes of one record."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids, with the encoder's placeholder once for the image."""
        ...

    @property
    def labels(self) -> list[int]:
        """What to predict, -100 where nothing is."""
        ...

    @property
    def left_out(self) -> int:
        """Tokens that were cut off already."""
        ...


class ConversationEncoder(Protocol):
    """Turns records into tokens in the conversation format of one model."""

    @property
    def placeholder(self) -> int:
        """What stands for the image in `EncodedSample.input_ids`; not the id of any token."""
        ...

    @property
    def pad_token_id(self) -> int:
        """Token to fill rows with."""
        ...

    @property
    def max_length(self) -> int:
        """Longest sample in tokens."""
        ...

    def encode(self, record: Mapping[str, Any]) -> EncodedSample:
        """Encode a record in the schema of LLaVA's mixture."""
        ...


@dataclass(frozen=True)
class TuningFormat:
    """How one model reads a training sample: one image at most, then the conversation.

    Attributes:
        encoder: From records to tokens and labels; can be pickled.
        preprocess: From PIL images to pixel values, (images, 3, height, width), float32; can be
            pickled.
        image_token_id: What the model wants in place of the encoder's placeholder.
        tokens_per_image: How often.
        image_size: Height and width of the pixel values.
    """

    encoder: ConversationEncoder
    preprocess: Callable[[Sequence[Image]], Tensor]
    image_token_id: int
    tokens_per_image: int
    image_size: int


@dataclass(frozen=True)
class TuningParts:
    """Where the parts of a loaded model are, as dotted paths of modules.

    Attributes:
        language_model: Module whose linear layers may take LoRA; neither tower nor projector nor
            output layer lies in it, unless `excluded` says so.
        projector: Modules between tower and language model, trained as a whole where that is asked
            for.
        vision_tower: The tower.
        output_head: The layer that gives the logits.
        excluded: Modules inside of `language_model` that take no LoRA, as cross-attention to
            images; last names or dotted paths.
        other_encoders: Encoders beside the tower, frozen as it is.
        vocabulary_size: Leading rows of the output layer that stand for tokens; those behind fill
            up, and take no part in the loss.
    """

    language_model: str
    projector: tuple[str, ...]
    vision_tower: str
    output_head: str
    vocabulary_size: int
    excluded: tuple[str, ...] = ()
    other_encoders: tuple[str, ...] = ()

    @property
    def encoders(self) -> tuple[str, ...]:
        """The tower and what reads images beside it."""
        return (self.vision_tower, *self.other_encoders)

    @property
    def whole(self) -> tuple[str, ...]:
        """All that takes no LoRA and is never quantised."""
        return (*self.encoders, *self.projector, self.output_head)


@runtime_checkable
class MLLMTuner(Protocol):
    """What an adapter may provide on top: tuning of its model's language model."""

    def tuning_parts(self, base: Path) -> TuningParts:
        """Return where the parts are; reads configuration files only.

        Raises:
            UserError: If the model cannot be tuned here.
        """
        ...

    def tuning_format(self, base: Path, *, max_length: int) -> TuningFormat:
        """Return how samples are read; loads tokenizer and image settings, no weights.

        Args:
            base: Model directory.
            max_length: Longest sample in tokens.

        Raises:
            UserError: If tokenizer or processor are missing or follow another format.
        """
        ...

    def build_empty(self, base: Path) -> nn.Module:
        """Return the model on the meta device, from its configuration alone."""
        ...

    def load_for_tuning(
        self, base: Path, *, dtype: str, device: str, quantization: object | None = None
    ) -> nn.Module:
        """Load the model as it is to be tuned, in evaluation mode.

        Args:
            base: Model directory.
            dtype: "float32" or "bfloat16".
            device: As for `open_runtime`.
            quantization: A quantisation configuration of transformers, or None.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        ...

    def hidden_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the output layer reads, (rows, tokens, width).

        Args:
            model: From `load_for_tuning`, LoRA layers in place or not.
            batch: `input_ids`, (rows, tokens); `attention_mask` likewise, absent where rows are
                packed; `pixel_values`, (images, 3, height, width), in the order of the rows and
                absent without any; `position_ids`, (rows, tokens), for packed rows only, beginning
                at 0 in each sample.
        """
        ...

    def image_features(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Return what the language model gets of images, after the projector."""
        ...
