"""Build a tower in the library that its format belongs to, from the file itself.

The second opinion of a conversion: no tensor goes through `formats.convert`, so that an error there
cannot hide by being made twice. transformers reads its own directories, open_clip its
repositories, and bare state dicts are loaded, strictly, into open_clip's or timm's modules.
Weights of half precision are raised to float32, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.errors import TowerError
from kuea_mllm.io import read_json
from kuea_mllm.model_files import channel_values, image_settings
from kuea_mllm.towers.files.checkpoints import OPEN_CLIP_CONFIG, read_checkpoint_file, read_config
from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.spec import TowerSpec, Triple

_CHANNELS = ("image_mean", "image_std")
_APPROXIMATIONS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True)
class OwnModel:
    """A tower as its own library builds it.

    Attributes:
        library: Name of the library, for tables.
        module: The model.
        embed: Runs it on normalised pixels and gives the family's image embedding; None where the
            tower has no projection.
        last_block: The last transformer block: its input and output are the tokens compared.
        prefix_tokens: Tokens before the patches.
        mean: Channel means that the format states, None if it states none.
        std: Channel deviations likewise.
    """

    library: str
    module: nn.Module
    embed: Callable[[Tensor], Tensor | None]
    last_block: nn.Module
    prefix_tokens: int
    mean: Triple | None = None
    std: Triple | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: float32, or float64 for a tower of that dtype."""
        return next(self.module.parameters()).dtype


def open_in_own_library(source: Path, *, layout: str, spec: TowerSpec) -> OwnModel:
    """Build the tower of a file or directory.

    Args:
        source: Where it is on disk.
        layout: A key of `formats.layouts.LAYOUTS`.
        spec: Activation, heads and the like, which bare state dicts do not state. Directories are
            read by their own configuration.

    Raises:
        TowerError: If the library does not take the weights as they are.
    """
    if layout == "hf_directory":
        return _transformers_directory(source)
    if layout == "open_clip_directory":
        return _open_clip_directory(source)
    state = _flat(read_checkpoint_file(source))
    if layout == "hf":
        return _transformers_file(state, spec, source)
    if spec.family == "siglip":
        return _timm_trunk(_half(state, keys.TRUNK_PREFIX, "pos_embed"), spec, source)
    return _open_clip_visual(_half(state, "", "class_embedding"), spec, source)


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file, those of dictionaries inside of it included."""
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            found |= {f"{name}.{inner}": t for inner, t in _flat(value).items()}
    return found


def _half(state: Mapping[str, Tensor], last: str, anchor: str) -> dict[str, Tensor]:
    """Return the tensors beside the anchor, whatever stands before their names."""
    places = [n.removesuffix(anchor) for n in state if f".{n}".endswith(f".{last}{anchor}")]
    prefix = min(places, key=len)
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _working_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for tensor in state.values())
    return torch.float64 if wide else torch.float32


def _fill(module: nn.Module, state: Mapping[str, Tensor], library: str, where: Path) -> nn.Module:
    module = module.to(_working_dtype(state)).eval()
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise TowerError(
            f"{library} does not take the weights of {where}: {reason[:300]}"
        ) from error
    return module


def _open_clip_visual(state: dict[str, Tensor], spec: TowerSpec, where: Path) -> OwnModel:
    from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer

    activation: Any = QuickGELU
    if spec.activation in _APPROXIMATIONS:
        activation = partial(nn.GELU, approximate=_APPROXIMATIONS[spec.activation])
    visual: Any = VisionTransformer(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        width=spec.width,
        layers=spec.layers,
        heads=spec.heads,
        mlp_ratio=mlp_ratio(spec),
        output_dim=spec.embedding_width,
        act_layer=activation,
        norm_layer=partial(LayerNorm, eps=spec.layer_norm_eps),
    )
    has_projection = "proj" in state
    if not has_projection:
        visual.proj = None
    _fill(visual, state, "open_clip", where)

    def embed(pixels: Tensor) -> Tensor | None:
        found: Tensor = visual(pixels)
        return found if has_projection else None

    return OwnModel("open_clip", visual, embed, visual.transformer.resblocks[-1], prefix_tokens=1)


def mlp_ratio(spec: TowerSpec) -> float:
    """Return the ratio that open_clip and timm, which cut off the rest, turn into `mlp_width`."""
    exact = spec.mlp_width / spec.width
    is_kept = int(spec.width * exact) == spec.mlp_width
    return exact if is_kept else (spec.mlp_width + 0.5) / spec.width


def _timm_trunk(state: dict[str, Tensor], spec: TowerSpec, where: Path) -> OwnModel:
    from timm.models.vision_transformer import VisionTransformer

    activation: Any = {
        "gelu": nn.GELU,
        "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
        "quick_gelu": _quick_gelu(),
    }[spec.activation]
    trunk: Any = VisionTransformer(
        img_size=spec.image_size,
        patch_size=spec.patch_size,
        embed_dim=spec.width,
        depth=spec.layers,
        num_heads=spec.heads,
        mlp_ratio=mlp_ratio(spec),
        num_classes=0,
        global_pool="map",
        class_token=False,
        act_layer=activation,
        norm_layer=partial(nn.LayerNorm, eps=spec.layer_norm_eps),
    )
    _fill(trunk, state, "timm", where)
    return OwnModel("timm", trunk, trunk, trunk.blocks[-1], prefix_tokens=0)


def _quick_gelu() -> type[nn.Module]:
    from open_clip.transformer import QuickGELU

    found: type[nn.Module] = QuickGELU
    return found


def _open_clip_directory(directory: Path) -> OwnModel:
    import open_clip

    path = directory / OPEN_CLIP_CONFIG
    content = read_json(path)
    model = content.get("model_cfg", content)
    if model.get("text_cfg", {}).get("hf_model_name"):
        raise TowerError(
            f"{path} names a text tower of the Hub, {model['text_cfg']['hf_model_name']}, without "
            "which open_clip does not open it.",
            "Leave out the comparison with --no-check.",
        )
    try:
        # The very call that users of the directory make; its loading is strict.
        visual: Any = open_clip.create_model(f"local-dir:{directory.absolute()}").visual.eval()
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise TowerError(f"open_clip does not open {directory}: {reason[:300]}") from error
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    return OwnModel(
        "open_clip",
        visual,
        visual,
        blocks[-1],
        prefix_tokens=0 if hasattr(visual, "trunk") else 1,
        mean=_triple(visual.image_mean),
        std=_triple(visual.image_std),
    )


def _transformers_directory(directory: Path) -> OwnModel:
    from transformers import (
        CLIPModel,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
        SiglipModel,
        SiglipVisionModel,
    )

    config = read_config(directory)
    kind = str(config["model_type"])
    classes: dict[str, Any] = {
        "clip": CLIPModel,
        "clip_vision_model": CLIPVisionModel,
        "siglip": SiglipModel,
        "siglip_vision_model": SiglipVisionModel,
    }
    model_class = classes[kind]
    if "CLIPVisionModelWithProjection" in (config.get("architectures") or []):
        model_class = CLIPVisionModelWithProjection
    settings = image_settings(directory)
    mean, std = (_triple(channel_values(settings, key, directory)) for key in _CHANNELS)
    with _quiet_transformers():
        model, report = model_class.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    _refuse_gaps(report, directory)
    return _of_transformers(model.eval(), mean, std)


def _transformers_file(state: dict[str, Tensor], spec: TowerSpec, where: Path) -> OwnModel:
    from kuea_mllm.towers.model.tower import architecture

    vision = {n: t for n, t in state.items() if not n.endswith(keys.IGNORED_SUFFIX)}
    config, model_class = architecture(spec, has_projection=keys.PROJECTION in vision)
    make: Any = model_class.from_pretrained
    with _quiet_transformers():
        model, report = make(
            None, config=config, state_dict=vision, dtype=torch.float32, output_loading_info=True
        )
    _refuse_gaps(report, where)
    return _of_transformers(model.eval(), None, None)


def _of_transformers(model: Any, mean: Triple | None, std: Triple | None) -> OwnModel:
    """Take the vision half of any of the five classes."""
    body = getattr(model, "vision_model", model)
    projection = getattr(model, "visual_projection", None)
    is_clip = "clip_vision" in str(body.config.model_type)

    def embed(pixels: Tensor) -> Tensor | None:
        output = body(pixel_values=pixels)
        if projection is not None:
            projected: Tensor = projection(output.pooler_output)
            return projected
        return None if is_clip else output.pooler_output

    return OwnModel(
        "transformers", model, embed, body.encoder.layers[-1], 1 if is_clip else 0, mean, std
    )


def _triple(values: Any) -> Triple | None:
    if values is None:
        return None
    # open_clip knows one number for all channels as well.
    red, green, blue = [values] * 3 if isinstance(values, float | int) else values
    return float(red), float(green), float(blue)


def _refuse_gaps(report: Mapping[str, Any], where: Path) -> None:
    missing = sorted(str(name) for name in report["missing_keys"])
    mismatched = sorted(str(name) for name in report["mismatched_keys"])
    if missing or mismatched:
        raise TowerError(
            f"transformers finds no value in {where} for {', '.join((missing + mismatched)[:3])}."
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the loading bar and the report on the text half's keys off the terminal."""
    from transformers.utils import logging

    library_logging: Any = logging
    level, bar = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bar:
            library_logging.enable_progress_bar()
