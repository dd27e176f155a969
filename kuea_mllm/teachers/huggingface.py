"""Teachers of transformers: DINOv2, DINOv3, MLCD, CLIP, SigLIP, ViT and the like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedModel

from kuea_mllm.errors import TowerError
from kuea_mllm.teachers.backbone import RawOutput, TokenLayout
from kuea_mllm.towers.files.checkpoints import read_config
from kuea_mllm.towers.reading.load import load_tower

_TOWER_TYPES = {"clip", "clip_vision_model", "siglip", "siglip_vision_model"}
_NAFLEX_TYPES = {"siglip2", "siglip2_vision_model"}
# Total stride of models that state no patch size but give one token per cell of their last map.
_STRIDES = {"dinov3_convnext": 32}
# Tokens beside the class token and the registers: DeiT's distillation token.
_EXTRA_TOKENS = {"deit": 1}


class HuggingFaceBackbone:
    """A transformers vision model.

    Args:
        model: The model; takes `pixel_values` alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: nn.Module = model
        self.kind = str(model.config.model_type)
        config: Any = model.config
        patch = getattr(config, "patch_size", None)
        self._patch_size = patch if isinstance(patch, int) else _STRIDES.get(self.kind)
        self._registers = int(getattr(config, "num_register_tokens", 0) or 0)
        size = getattr(config, "image_size", None)
        self.image_size = size if isinstance(size, int) else None
        values = config.to_dict()
        # Where it was loaded from and by what says nothing about what it computes.
        for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
            values.pop(name, None)
        self.architecture = json.dumps(values, sort_keys=True, default=str)

    def run(self, pixels: Tensor) -> RawOutput:
        """Run the model on normalised pixels, (n, 3, side, side)."""
        output: Any = self.model(pixel_values=pixels)
        pooled = getattr(output, "image_embeds", None)
        if pooled is None:
            pooled = getattr(output, "pooler_output", None)
        tokens = getattr(output, "last_hidden_state", None)
        return RawOutput(None if pooled is None else pooled.flatten(1), tokens)

    def token_layout(self, pixels: Tensor) -> TokenLayout | str:
        """Find out by a run how to read the tokens, or say in words why they cannot be."""
        with _record_norms(self.model) as calls:
            tokens = self.run(pixels).tokens
        if tokens is None:
            return "it has no last hidden state"
        grid = pixels.shape[-1] // self._patch_size if self._patch_size else 0
        prefix = tokens.shape[1] - grid * grid if tokens.ndim == 3 and grid else -1
        others = self._registers + _EXTRA_TOKENS.get(self.kind, 0)
        if not 0 <= prefix - others <= 1:
            return f"its output of shape {tuple(tokens.shape)} is not one token per patch"
        norm = _find_final_norm(tokens, calls)
        if isinstance(norm, str):
            return norm
        return TokenLayout(grid, prefix, prefix > others, norm, tokens.shape[2])


def load_huggingface(
    path: Path, source: str, *, pooled: bool, dtype: torch.dtype
) -> HuggingFaceBackbone:
    """Load a Hugging Face directory of a vision model.

    Args:
        path: The directory.
        source: What to call it in errors.
        pooled: Whether its pooled output will be read.
        dtype: Dtype of the weights.

    Raises:
        TowerError: If it is no vision model, of unknown type, or lacks weights.
    """
    return HuggingFaceBackbone(_load_model(path, source, pooled, dtype))


def _load_model(path: Path, source: str, pooled: bool, dtype: torch.dtype) -> PreTrainedModel:
    model_type = str(read_config(path).get("model_type"))
    if model_type in _TOWER_TYPES:
        return load_tower(path, dtype=dtype).model
    if model_type in _NAFLEX_TYPES:
        raise TowerError(
            f"teacher {source} is a NaFlex SigLIP2 model ({model_type}), which takes lists of "
            "patches instead of square images.",
            "Take a SigLIP2 of fixed resolution, such as google/siglip2-so400m-patch14-224.",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError) as error:
        raise TowerError(
            f"teacher {source}: transformers does not know the model type {model_type!r}.",
            "Take a model that needs no remote code, such as facebook/dinov2-with-registers-large.",
        ) from error
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if model_class is None or getattr(model_class, "main_input_name", "") != "pixel_values":
        raise TowerError(
            f"teacher {source} is no vision model: its model_type is {model_type!r}.",
            "Take an image encoder, such as facebook/dinov2-with-registers-large.",
        )
    try:
        model, report = model_class.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TowerError(f"teacher {source} cannot be loaded: {reason[0]}") from error
    # transformers fills what is missing with random numbers and goes on. Only a pooler that is not
    # read may be missing, and is taken off: it would make the fingerprint random.
    absent = set(report["missing_keys"])
    if not pooled and any(name.startswith("pooler.") for name in absent):
        model.pooler = None
        absent = {name for name in absent if not name.startswith("pooler.")}
    if missing := sorted(absent):
        raise TowerError(
            f"teacher {source} lacks weights: {', '.join(missing[:3])}.",
            "The directory is incomplete"
            + (", or the model has no pooler: take the readout cls." if pooled else "."),
        )
    return cast(PreTrainedModel, model)


NormCall = tuple[nn.Module, Tensor, Tensor]


@contextmanager
def _record_norms(model: nn.Module) -> Iterator[list[NormCall]]:
    """Note input and output of every norm layer that runs inside the block."""
    calls: list[NormCall] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, inputs[0], output))

    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    hooks = [module.register_forward_hook(note) for module in norms]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _find_final_norm(tokens: Tensor, calls: list[NormCall]) -> nn.Module | str | None:
    """Tell which norm is still to be applied to the last hidden state.

    Most families return it normed; CLIP and MLCD norm the class token alone, after the fact. Seen
    from what ran, not from a list of families: a list would be silently wrong for the next one.
    """
    if any(out.shape == tokens.shape and torch.equal(out, tokens) for _, _, out in calls):
        return None
    first = tokens[:, 0].flatten()
    for module, given, _ in calls:
        if given.numel() == first.numel() and torch.equal(given.flatten(), first):
            return module
    return "its last hidden state has been through no final norm that could be found"
