"""What a vision tower is: its sizes, its activation and the pixels it expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kuea_mllm.errors import TowerError

Family = Literal["clip", "siglip"]
Resize = Literal["shortest_edge", "squash"]
Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN: Triple = (0.5, 0.5, 0.5)
SIGLIP_STD: Triple = (0.5, 0.5, 0.5)

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class TowerSpec:
    """Architecture and preprocessing of one vision tower.

    Attributes:
        family: "clip" (class token, projection) or "siglip" (no class token, attention pooling).
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels.
        width: Width of the tokens.
        layers: Number of transformer blocks.
        heads: Number of attention heads; not recoverable from weights.
        mlp_width: Hidden width of the blocks' MLP.
        embedding_width: Width of the pooled (and, for CLIP, projected) embedding; equals `width`
            for a CLIP tower that has no projection.
        activation: Name that transformers uses: "quick_gelu" (OpenAI), "gelu" (erf),
            "gelu_pytorch_tanh"; not recoverable from weights.
        layer_norm_eps: Epsilon of every LayerNorm.
        mean: Per-channel mean to subtract from pixels in [0, 1].
        std: Per-channel deviation to divide by.
        resize: "shortest_edge" (then centre crop) or "squash" (to a square, SigLIP).
    """

    family: Family
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    embedding_width: int
    activation: str
    layer_norm_eps: float
    mean: Triple
    std: Triple
    resize: Resize

    @property
    def grid(self) -> int:
        """Patches per side of the image."""
        return self.image_size // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: one (the class token) for CLIP, none for SigLIP."""
        return 1 if self.family == "clip" else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model: what no weight tells.

    Attributes:
        image_size: Side of the final image in pixels, None if open.
        mean: Per-channel mean.
        std: Per-channel deviation.
        resize: As in `TowerSpec`.
        resize_to: Length of the shorter side before the crop, None if open.
    """

    image_size: int | None
    mean: Triple
    std: Triple
    resize: Resize
    resize_to: int | None = None


def default_preprocessing(family: Family) -> Preprocessing:
    """Return the preprocessing a family was trained with, its image size left open."""
    if family == "clip":
        return Preprocessing(None, CLIP_MEAN, CLIP_STD, "shortest_edge")
    return Preprocessing(None, SIGLIP_MEAN, SIGLIP_STD, "squash")


def parse_preprocessor(config: Mapping[str, Any], where: str) -> Preprocessing:
    """Read a Hugging Face `preprocessor_config.json`.

    Args:
        config: Content of the file.
        where: Name of the file, for errors.

    Raises:
        TowerError: If mean, deviation or size are missing or malformed.
    """
    size = config.get("size")
    squashes = isinstance(size, Mapping) and "height" in size
    cropped = config.get("do_center_crop", not squashes)
    final = config.get("crop_size", size) if cropped else size
    return Preprocessing(
        image_size=_side(final, where),
        resize_to=_side(size if config.get("do_resize", True) else final, where),
        mean=parse_triple(config.get("image_mean"), "image_mean", where),
        std=parse_triple(config.get("image_std"), "image_std", where),
        resize="squash" if squashes else "shortest_edge",
    )


def _side(size: object, where: str) -> int:
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    side = sides[0] if sides else None
    if not isinstance(side, int) or side <= 0 or any(other != side for other in sides):
        raise TowerError(f"{where}: the image size {size!r} is not that of a square image.")
    return side


def parse_triple(value: object, key: str, where: str) -> Triple:
    """Read one number per channel.

    Raises:
        TowerError: If it is no list of three.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise TowerError(f"{where}: {key} must be a list of three numbers, not {value!r}.")
    red, green, blue = (float(v) for v in value)
    return red, green, blue
