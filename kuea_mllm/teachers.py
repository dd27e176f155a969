"""Frozen vision models whose geometry the student is aligned to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.checkpoints import (
    read_config,
    read_image_processor_config,
    resolve_source,
)
from kuea_mllm.towers.encode import normalise
from kuea_mllm.towers.fingerprint import fingerprint_tensors
from kuea_mllm.towers.load import load_tower
from kuea_mllm.towers.spec import Preprocessing, Triple, parse_preprocessor

Readout = Literal["cls", "pooled", "mean_patch"]
Normalisation = Literal["own", "student"]

_TOWER_TYPES = {"clip", "clip_vision_model", "siglip", "siglip_vision_model"}
# Their last_hidden_state has not been through the final norm; pooler_output is its class token
# after that norm.
_UNNORMED_TYPES = {"clip_vision_model", "mlcd", "mlcd_vision_model"}


class Teacher(nn.Module):
    """A frozen vision model, from shared pixels in [0, 1] to one embedding per image.

    Use `load_teacher` to make one.

    Args:
        model: A transformers vision model.
        source: Where it was loaded from.
        readout: "cls" (class token after the final norm), "pooled" (pooler output or projected
            image embedding) or "mean_patch" (mean over patch tokens, class token and registers
            skipped).
        image_size: Side of the images it is run on, in pixels.
        mean: Per-channel mean to subtract.
        std: Per-channel deviation to divide by.

    Raises:
        TowerError: If the model has no such readout, or does not take images of that size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        source: str,
        readout: Readout,
        image_size: int,
        mean: Triple,
        std: Triple,
    ) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.source = source
        self.readout = readout
        self.image_size = image_size
        self.mean, self.std = mean, std
        self.model_type = str(model.config.model_type)
        self._registers = int(getattr(model.config, "num_register_tokens", 0) or 0)
        self._patch_size = _patch_size(model.config)
        self.requires_grad_(False)
        self.eval()
        self.width = self._probe()
        # Hashed once, while loading: the weights never change, a large model takes seconds.
        self.weights_fingerprint = fingerprint_tensors(sorted(model.state_dict().items()))

    @property
    def fingerprint(self) -> str:
        """What cached embeddings depend on: weights, readout, size and normalisation."""
        settings = [self.weights_fingerprint, self.readout, self.image_size, self.mean, self.std]
        return fingerprint_tensors([(json.dumps(settings), torch.empty(0))])

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever the module around it is switched to."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, pixels01: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels01: Images in [0, 1], (n, 3, height, width), square. They are resized if they are
                not of the teacher's size.

        Returns:
            Embeddings, (n, width), not normalised, in the dtype of the weights.
        """
        dtype = next(self.model.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)
        pixels = resize_pixels(pixels01.to(wide), self.image_size)
        inputs = normalise(pixels, self.mean, self.std).to(dtype)
        return self._read(self.model(pixel_values=inputs))

    def _read(self, output: Any) -> Tensor:
        if self.readout == "pooled":
            pooled = getattr(output, "image_embeds", None)
            if pooled is None:
                pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise self._refusal("it has no pooled output", "Take the readout cls.")
            return cast(Tensor, pooled).flatten(1)
        tokens = output.last_hidden_state
        before = self._tokens_before_patches(tokens)
        if self.readout == "mean_patch":
            return cast(Tensor, tokens[:, before:].mean(1))
        if before - self._registers < 1:
            raise self._refusal("it has no class token", "Take the readout pooled or mean_patch.")
        if self.model_type in _UNNORMED_TYPES:
            return cast(Tensor, self._final_norm()(tokens[:, 0]))
        return cast(Tensor, tokens[:, 0])

    def _tokens_before_patches(self, tokens: Tensor) -> int:
        grid = self.image_size // self._patch_size if self._patch_size else 0
        before = tokens.shape[1] - grid * grid if tokens.ndim == 3 and grid else -1
        if not 0 <= before - self._registers <= 1:
            raise self._refusal(
                f"its output of shape {tuple(tokens.shape)} is not one token per patch",
                "Take the readout pooled.",
            )
        return before

    def _final_norm(self) -> nn.Module:
        for name, module in self.model.named_modules():
            if name.endswith("post_layernorm"):
                return cast(nn.Module, module)
        raise self._refusal("it has no final norm", "Take the readout pooled.")

    def _refusal(self, problem: str, remedy: str) -> TowerError:
        return TowerError(
            f"teacher {self.source} ({self.model_type}) cannot be read as {self.readout}: "
            f"{problem}.",
            remedy,
        )

    def _probe(self) -> int:
        # One black image: tells width, readout and size mistakes now and not after an hour.
        weight = next(self.model.parameters())
        side = self.image_size
        image = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
        try:
            return int(self(image).shape[1])
        except (ValueError, RuntimeError) as error:
            raise TowerError(
                f"teacher {self.source} ({self.model_type}) does not take images of {side} "
                f"pixels: {str(error).splitlines()[0]}",
                "Set the teacher's image size to the one it was trained with.",
            ) from error


def load_teacher(
    source: str | Path,
    *,
    readout: Readout = "cls",
    normalisation: Normalisation = "own",
    student_mean: Triple | None = None,
    student_std: Triple | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Teacher:
    """Load any Hugging Face vision model as a teacher (DINOv2, MLCD, CLIP, SigLIP, ViT, ...).

    Args:
        source: Hugging Face directory or Hub id.
        readout: Which output is the embedding; see `Teacher`.
        normalisation: "own" takes mean and deviation of the teacher's image processor; "student"
            those of the student, as the released KUEA code does.
        student_mean: The student's mean; needed for "student".
        student_std: The student's deviation; needed for "student".
        image_size: Side of the images in pixels; by default that of the teacher's image processor,
            or of its configuration.
        dtype: Dtype of the weights.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        TowerError: If there is no such model, it is no vision model, it lacks weights, or it has no
            such readout.
    """
    path = resolve_source(source, revision=revision)
    if path.is_file():
        raise TowerError(
            f"teacher {source} is a file, not a Hugging Face model.",
            "Give a model directory or a Hub id; `kuea-mllm convert` makes one of a CLIP file.",
        )
    model = _load_model(path, str(source), readout, dtype)
    own = _own_preprocessing(path)
    if normalisation == "student":
        mean, std = student_mean, student_std
        remedy = "Pass the student's mean and deviation."
    else:
        mean, std = (own.mean, own.std) if own else (None, None)
        remedy = "Set the teacher's normalisation to student, or add a preprocessor_config.json."
    if mean is None or std is None:
        raise TowerError(f"teacher {source}: mean and deviation of its pixels are unknown.", remedy)
    side = image_size or (own and own.image_size) or _config_size(model.config)
    if side is None:
        raise TowerError(f"teacher {source} states no image size.", "Set the teacher's image size.")
    return Teacher(model, source=str(source), readout=readout, image_size=side, mean=mean, std=std)


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


def _load_model(path: Path, source: str, readout: Readout, dtype: torch.dtype) -> PreTrainedModel:
    model_type = str(read_config(path).get("model_type"))
    if model_type in _TOWER_TYPES:
        return load_tower(path, dtype=dtype).model
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
    if readout != "pooled" and any(name.startswith("pooler.") for name in absent):
        model.pooler = None
        absent = {name for name in absent if not name.startswith("pooler.")}
    if missing := sorted(absent):
        raise TowerError(
            f"teacher {source} lacks weights: {', '.join(missing[:3])}.",
            "The directory is incomplete"
            + (
                ", or the model has no pooler: take the readout cls."
                if readout == "pooled"
                else "."
            ),
        )
    return cast(PreTrainedModel, model)


def _own_preprocessing(directory: Path) -> Preprocessing | None:
    found = read_image_processor_config(directory)
    return None if found is None else parse_preprocessor(found[1], found[0])


def _config_size(config: PretrainedConfig) -> int | None:
    size = getattr(config, "image_size", None)
    return size if isinstance(size, int) else None


def _patch_size(config: PretrainedConfig) -> int | None:
    size = getattr(config, "patch_size", None)
    return size if isinstance(size, int) else None
