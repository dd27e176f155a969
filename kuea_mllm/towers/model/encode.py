"""Run a tower on images in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kuea_mllm.errors import TowerError
from kuea_mllm.features import Features
from kuea_mllm.towers.spec import Triple

if TYPE_CHECKING:
    from kuea_mllm.towers.model.tower import Tower


def normalise(pixels01: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Return `(pixels01 - mean) / std` per channel.

    Args:
        pixels01: Images, (n, 3, height, width), in [0, 1].
        mean: What to subtract.
        std: What to divide by.
    """
    # Made anew in the dtype of the pixels: constants kept in a float32 buffer would cost a float64
    # run 1e-7, which is more than the golden traces allow.
    # Filled on the device: copying a list of numbers to a GPU makes the host wait for all its work.
    shift, scale = (
        torch.cat([pixels01.new_full((1, 1, 1), value) for value in values])
        for values in (mean, std)
    )  # (3, 1, 1)
    return (pixels01 - shift) / scale


class TowerEncoder(nn.Module):
    """A vision tower with its normalisation built in, so that all models share one pixel tensor.

    Args:
        tower: The tower to run; its model is held, not copied.

    Raises:
        TowerError: If it is a CLIP tower without projection, whose pooled output is not the
            embedding that the method is about.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        if not tower.has_projection:
            raise TowerError(
                f"{tower.source} holds no visual_projection.weight, so it has no CLIP embedding.",
                "Take the tower from a full CLIP model, not from the vision half of an MLLM.",
            )
        self.model: nn.Module = tower.model
        self.spec = tower.spec

    @property
    def width(self) -> int:
        """Width of the pooled embedding."""
        return self.spec.embedding_width

    def forward(self, pixels01: Tensor) -> Tensor:
        """Return pooled, projected, not normalised embeddings.

        Args:
            pixels01: Images in [0, 1], (n, 3, image_size, image_size).

        Returns:
            Embeddings, (n, embedding_width), in the dtype of the weights.
        """
        return self.features(pixels01).pooled

    def features(self, pixels01: Tensor, layer: int | None = None) -> Features:
        """Return pooled embeddings and, from the same pass, the patch tokens of one hidden state.

        Args:
            pixels01: Images in [0, 1], (n, 3, image_size, image_size).
            layer: Index into the hidden states: 0 is the input of the first block, i + 1 the output
                of block i, -2 the tap of LLaVA-1.5. None gives no patch tokens.

        Returns:
            Pooled embeddings as of `forward`; tokens without class token and final norm.
        """
        wants_patches = layer is not None
        output: Any = self.model(
            pixel_values=self._pixels(pixels01), output_hidden_states=wants_patches
        )
        pooled = output.image_embeds if self.spec.family == "clip" else output.pooler_output
        # Taken from the block: open_clip >= 2.23 would return tokens after the final norm.
        tokens = (
            output.hidden_states[layer][:, self.spec.prefix_tokens :] if wants_patches else None
        )
        return Features(pooled, tokens)

    def forward_tokens(self, pixels01: Tensor, layer: int = -2) -> Tensor:
        """Return the patch tokens of one hidden state, (n, patches, width); see `features`."""
        return cast(Tensor, self.features(pixels01, layer).patches)

    def hidden_states(self, pixels01: Tensor) -> tuple[Tensor, ...]:
        """Return the input of the first block and the output of every block, class token first."""
        output: Any = self.model(pixel_values=self._pixels(pixels01), output_hidden_states=True)
        return tuple(output.hidden_states)

    def _pixels(self, pixels01: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        # Normalised before rounding to a half-precision tower's dtype.
        wide = pixels01.to(torch.promote_types(pixels01.dtype, torch.float32))
        if dtype == torch.float64:
            wide = wide.to(dtype)
        return normalise(wide, self.spec.mean, self.spec.std).to(dtype)
