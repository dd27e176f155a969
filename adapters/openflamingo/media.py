"""Which image each position of the text sees, and the encoded images themselves.

Text sees the one image right before it: position s sees image t (counted from 1) exactly if t
`<image>` tokens stand at or before s. Two corners are the original's and kept: text before the
first image gets nothing from the attention, and text behind an `<image>` too many sees the mean of
all images of its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


@dataclass
class EncodedImages:
    """Images after the resampler, with what the gated blocks make of them.

    Made once per generation: the keys and values of every block are kept, so that a decoding step
    computes neither tower, resampler nor their projections again.

    Attributes:
        features: (examples, images, latents, width); may serve several rows per example, as in beam
            search, where row r belongs to example r // (rows / examples).
        projected: Keys and values by decoder layer, filled as layers run but never with gradients;
            None keeps none.
    """

    features: Tensor
    projected: dict[int, KeyValue] | None = None

    @property
    def tokens(self) -> Tensor:
        """All latents of an example in a row, (examples, images * latents, width)."""
        return self.features.flatten(1, 2)

    def key_value(self, layer: int, project: Callable[[], KeyValue]) -> KeyValue:
        """Return the keys and values of a layer, computed at most once."""
        if self.projected is None or torch.is_grad_enabled():
            return project()
        if layer not in self.projected:
            self.projected[layer] = project()
        return self.projected[layer]


@dataclass(frozen=True)
class MediaMask:
    """Which latents each position may look at.

    Attributes:
        visible: (rows, 1, positions, images * latents), boolean; never empty for a position.
        sees_nothing: (rows, positions, 1): what such a position attends to is dropped.
        sees_mean: (rows, 1, positions, 1): such a position weighs all visible latents the same.
    """

    visible: Tensor
    sees_nothing: Tensor
    sees_mean: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> MediaMask:
        """Move it; accelerate calls this where a model is spread over devices."""
        moved = (
            mask.to(device, non_blocking=non_blocking)
            for mask in (self.visible, self.sees_nothing, self.sees_mean)
        )
        return MediaMask(*moved)


def media_index(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Count the `<image>` tokens at or before each position.

    Args:
        input_ids: (rows, length), from the beginning of the text.
        image_token_id: Id of `<image>`.

    Returns:
        (rows, length): the image that each position sees, counted from 1; 0 for none.
    """
    return (input_ids == image_token_id).long().cumsum(dim=-1)


def media_mask(index: Tensor, images: int, latents: int, *, immediate_only: bool) -> MediaMask:
    """Build the mask of the gated blocks.

    Args:
        index: Image that each position sees, counted from 1, (rows, positions); 0 for none.
        images: Images per row.
        latents: Tokens per image.
        immediate_only: False shows every image up to that one, and to text before the first the
            mean of all.
    """
    number = torch.arange(1, images + 1, device=index.device)
    seen = index[:, :, None]
    shown = seen == number if immediate_only else seen >= number  # (rows, positions, images)
    # The original clears what such text attended to only in the way it was trained.
    nothing = (seen == 0) & immediate_only
    # Every score would be masked with the same number: the softmax is uniform over all of them.
    mean = (~shown.any(dim=-1, keepdim=True)) & ~nothing
    # A row of the softmax without any key is not a number; these two are dealt with apart.
    shown = shown | nothing | mean
    return MediaMask(
        visible=shown.repeat_interleave(latents, dim=-1)[:, None],
        sees_nothing=nothing,
        sees_mean=mean[:, None],
    )
