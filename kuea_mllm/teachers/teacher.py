"""A frozen vision model behind one protocol, whatever library it comes from."""

from __future__ import annotations

import json
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kuea_mllm.errors import TowerError
from kuea_mllm.features import Features
from kuea_mllm.teachers.backbone import Backbone, RawOutput, TokenLayout
from kuea_mllm.towers.model.encode import normalise
from kuea_mllm.towers.model.fingerprint import fingerprint_tensors
from kuea_mllm.towers.spec import Triple

Readout = Literal["cls", "pooled", "mean_patch"]


class Teacher(nn.Module):
    """A frozen vision model, from shared pixels in [0, 1] to features.

    Use `load_teacher` to make one.

    Args:
        backbone: The vision model.
        source: Where it was loaded from.
        readout: "cls" (class token after the final norm), "pooled" (pooler output or projected
            image embedding, as the model defines it) or "mean_patch" (mean over patch tokens after
            the final norm, class token and registers skipped).
        image_size: Side of the images it is run on, in pixels.
        mean: Per-channel mean to subtract.
        std: Per-channel deviation to divide by.

    Attributes:
        width: Width of the embedding.
        patch_width: Width of the patch tokens, None for a model without a square grid of them.
        grid: Patches per side, None for a model without a square grid of them.

    Raises:
        TowerError: If the model has no such readout, or does not take images of that size.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        source: str,
        readout: Readout,
        image_size: int,
        mean: Triple,
        std: Triple,
    ) -> None:
        super().__init__()
        self.model: nn.Module = backbone.model
        self.source = source
        self.readout = readout
        self.image_size = image_size
        self.mean, self.std = mean, std
        self.model_type = backbone.kind
        self._backbone = backbone
        self.requires_grad_(False)
        self.eval()
        self._layout = self._probe()
        layout = self._layout if isinstance(self._layout, TokenLayout) else None
        self.grid: int | None = layout.grid if layout else None
        self.patch_width: int | None = layout.width if layout else None
        self.width = int(self._embed(backbone.run(self._sample())).shape[1])
        # Hashed once, while loading: the weights never change, a large model takes seconds.
        self.weights_fingerprint = fingerprint_tensors(sorted(self.model.state_dict().items()))
        self._architecture = backbone.architecture

    @property
    def fingerprint(self) -> str:
        """What cached embeddings depend on: model, readout, size and normalisation."""
        shaped = [self._architecture, self.readout, self.image_size, self.mean, self.std]
        settings = [self.weights_fingerprint, *shaped]
        return fingerprint_tensors([(json.dumps(settings), torch.empty(0))])

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever the module around it is switched to."""
        del mode
        super().train(False)
        return self

    def forward(self, pixels01: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels01: Images in [0, 1], (n, 3, height, width), square. They are resized if they are
                not of the teacher's size.

        Returns:
            Embeddings, (n, width), not normalised, in the dtype of the weights.
        """
        return self.features(pixels01, patches=False).pooled

    @torch.no_grad()
    def features(self, pixels01: Tensor, *, patches: bool) -> Features:
        """Embed images, and give their patch tokens on request, from one run of the model.

        Args:
            pixels01: As for `forward`.
            patches: Whether to return patch tokens too.

        Returns:
            `pooled` as `forward` gives it; `patches` after the final norm, without class token and
            registers, (n, grid * grid, patch_width), row-major, or None.

        Raises:
            TowerError: If patch tokens are asked of a model that has no square grid of them.
        """
        dtype = next(self.model.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)
        pixels = resize_pixels(pixels01.to(wide), self.image_size)
        output = self._backbone.run(normalise(pixels, self.mean, self.std).to(dtype))
        return Features(self._embed(output), self._patches(output) if patches else None)

    def _embed(self, output: RawOutput) -> Tensor:
        if self.readout == "pooled":
            if output.pooled is None:
                raise self._refusal("it has no pooled output", "Take the readout cls.")
            return output.pooled
        if self.readout == "mean_patch":
            return self._patches(output).mean(1)
        layout, tokens = self._tokens(output)
        if not layout.has_class_token:
            raise self._refusal("it has no class token", "Take the readout pooled or mean_patch.")
        return layout.normed(tokens[:, 0])

    def _patches(self, output: RawOutput) -> Tensor:
        layout, tokens = self._tokens(output)
        return layout.normed(tokens[:, layout.prefix :])

    def _tokens(self, output: RawOutput) -> tuple[TokenLayout, Tensor]:
        if isinstance(self._layout, str) or output.tokens is None:
            reason = self._layout if isinstance(self._layout, str) else "it has no tokens"
            if self.readout == "pooled":
                raise TowerError(
                    f"teacher {self.source} ({self.model_type}) has no patch tokens: {reason}.",
                    "Take a ViT teacher, or set the weights of the patch terms to 0.",
                )
            raise self._refusal(reason, "Take the readout pooled.")
        return self._layout, output.tokens

    def _refusal(self, problem: str, remedy: str) -> TowerError:
        return TowerError(
            f"teacher {self.source} ({self.model_type}) cannot be read as {self.readout}: "
            f"{problem}.",
            remedy,
        )

    def _sample(self) -> Tensor:
        # A ramp, not a constant: two hidden states of a flat image might be equal by chance.
        weight = next(self.model.parameters())
        side = self.image_size
        ramp = torch.linspace(-1, 1, 3 * side * side, device=weight.device)
        return ramp.view(1, 3, side, side).to(weight.dtype)

    @torch.no_grad()
    def _probe(self) -> TokenLayout | str:
        # One image: tells size mistakes now and not after an hour.
        try:
            return self._backbone.token_layout(self._sample())
        except (ValueError, RuntimeError, AssertionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TowerError(
                f"teacher {self.source} ({self.model_type}) does not take images of "
                f"{self.image_size} pixels: {reason}",
                "Set the teacher's image size to the one it was trained with.",
            ) from error


def resize_pixels(pixels01: Tensor, side: int) -> Tensor:
    """Resize square images for a teacher of another size, as the released code does.

    Bicubic with antialias and *not clamped*: values may leave [0, 1] (the golden file ranges from
    -0.096 to 1.090).

    Args:
        pixels01: Images, (n, 3, height, width).
        side: Side to resize to; images that have it already are returned unchanged.

    Raises:
        ValueError: If the images are not square.
    """
    if pixels01.shape[-2] != pixels01.shape[-1]:
        raise ValueError(f"images must be square, not {tuple(pixels01.shape[-2:])}")
    if pixels01.shape[-1] == side:
        return pixels01
    return F.interpolate(
        pixels01, size=(side, side), mode="bicubic", align_corners=False, antialias=True
    )
