"""Teachers of timm. The only module that imports timm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from kuea_mllm.errors import TowerError
from kuea_mllm.teachers.backbone import RawOutput, TokenLayout
from kuea_mllm.towers.spec import Preprocessing, Triple


class TimmBackbone:
    """A timm model without its classifier.

    Args:
        model: The model, made with `num_classes=0` or reset to it.
        name: Its architecture.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model: nn.Module = model
        self.kind = f"timm {name}"
        self.architecture = f"{name}\n{model}"

    def run(self, pixels: Tensor) -> RawOutput:
        """Run the model on normalised pixels, (n, 3, side, side)."""
        model: Any = self.model
        tokens = model.forward_features(pixels)
        pooled = model.forward_head(tokens, pre_logits=True)
        return RawOutput(pooled if pooled.ndim == 2 else None, tokens)

    def token_layout(self, pixels: Tensor) -> TokenLayout | str:
        """Find out by a run how to read the tokens, or say in words why they cannot be."""
        tokens = self.run(pixels).tokens
        prefix = getattr(self.model, "num_prefix_tokens", None)
        if tokens is None or tokens.ndim != 3 or not isinstance(prefix, int):
            shape = "nothing" if tokens is None else f"shape {tuple(tokens.shape)}"
            return f"its features, of {shape}, are not one token per patch"
        grid = math.isqrt(max(tokens.shape[1] - prefix, 0))
        if not grid or grid * grid != tokens.shape[1] - prefix:
            return f"its {tokens.shape[1] - prefix} patch tokens form no square"
        # Models that average their tokens may norm the average and not the tokens (fc_norm).
        if isinstance(getattr(self.model, "norm", nn.Identity()), nn.Identity):
            return "its tokens go through no final norm"
        has_class_token = isinstance(getattr(self.model, "cls_token", None), Tensor)
        return TokenLayout(grid, prefix, has_class_token, None, tokens.shape[2])


def load_timm_name(
    source: str, *, image_size: int | None, dtype: torch.dtype
) -> tuple[TimmBackbone, Preprocessing]:
    """Load `timm:NAME` with the weights that timm knows, or `timm:NAME@FILE` with a file's.

    Raises:
        TowerError: If timm knows no such model, has no weights for it, or they do not fit.
    """
    name, _, file = source.partition(":")[2].partition("@")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        similar = timm.list_models(f"*{architecture[:8]}*")[:3]
        raise TowerError(
            f"teacher {source}: timm knows no model {name!r}.",
            f"Similar are: {', '.join(similar)}." if similar else "See timm.list_models().",
        )
    if not file and not timm.is_model_pretrained(architecture):
        raise TowerError(
            f"teacher {source}: timm has no weights for {architecture}.",
            f"Name a file of them: timm:{architecture}@FILE.",
        )
    if file and not Path(file).is_file():
        raise TowerError(f"teacher {source}: there is no file {file}.")
    overlay = {"file": file, "custom_load": False} if file else None
    return _create(name, source, image_size, dtype, pretrained_cfg_overlay=overlay)


def load_timm_directory(
    directory: Path, source: str, *, image_size: int | None, dtype: torch.dtype
) -> tuple[TimmBackbone, Preprocessing]:
    """Load a directory in the layout of timm's Hub repositories: config.json and weights.

    Raises:
        TowerError: If timm knows no such model, or the weights are absent or do not fit.
    """
    return _create(f"local-dir:{directory}", source, image_size, dtype)


def _create(
    name: str, source: str, image_size: int | None, dtype: torch.dtype, **options: Any
) -> tuple[TimmBackbone, Preprocessing]:
    def make(**size: Any) -> Any:
        # Made with its classifier and stripped afterwards: without one timm loads the weights
        # non-strictly, and what they lack would stay random.
        return timm.create_model(name, pretrained=True, **options, **size)

    try:
        try:
            model = make() if image_size is None else make(img_size=image_size)
        except TypeError:
            # Convolutional models take any size and no such argument.
            model = make()
    except Exception as error:
        # timm and the Hub client raise errors of many kinds, some of many lines.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TowerError(
            f"teacher {source} cannot be loaded by timm with its weights: {reason}",
            "Give a timm model that has weights, a complete directory of config.json and "
            "model.safetensors, or timm:NAME@FILE.",
        ) from error
    model.reset_classifier(0)
    model = model.to(dtype).eval()
    resolve: Any = resolve_model_data_config  # has no type information
    data = resolve(model)
    side = data["input_size"][-1]
    own = Preprocessing(side, _triple(data["mean"]), _triple(data["std"]), "squash")
    return TimmBackbone(model, str(model.pretrained_cfg.get("architecture", name))), own


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
