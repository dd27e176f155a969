"""Read the OpenFlamingo goldens and build their model; sizes and names come from the set."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from golden_files import golden_root
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from kuea_mllm.adapters.openflamingo import keys, released
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
from kuea_mllm.adapters.openflamingo.processing import (
    OpenFlamingoImageProcessor,
    OpenFlamingoProcessor,
)
from kuea_mllm.towers.reading.load import Tower, load_tower

TOLERANCE = 1e-4


def openflamingo_dir() -> Path:
    return golden_root() / "openflamingo"


@cache
def index() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((openflamingo_dir() / "index.json").read_text())
    return content


@cache
def tensors(file: str) -> dict[str, Tensor]:
    return load_file(openflamingo_dir() / file)


def case(name: str) -> dict[str, Tensor]:
    """Return the tensors of one forward case by their short names."""
    found = tensors("cases.safetensors")
    return {
        key.removeprefix(f"{name}."): t for key, t in found.items() if key.startswith(f"{name}.")
    }


def cases_with(quantity: str) -> list[str]:
    """Return the cases that hold a quantity."""
    return [name for name in index()["cases"] if quantity in case(name)]


def pixels(stored: Tensor) -> Tensor:
    """Drop the axis of frames, of which there is one."""
    assert stored.shape[2] == 1
    return stored[:, :, 0].float()


@cache
def golden_tower() -> Tower:
    vision = index()["config"]["vision"]
    activation = {"QuickGELU": "quick_gelu", "GELU": "gelu"}[index()["config"]["vision_activation"]]
    return load_tower(
        openflamingo_dir() / "vision" / "visual.safetensors",
        activation=activation,
        heads=vision["width"] // vision["head_width"],
    )


@cache
def golden_state() -> dict[str, Tensor]:
    """Return the whole model's tensors under our names."""
    checkpoint = tensors("flamingo/checkpoint.safetensors")
    names = keys.checkpoint_names(
        perceiver_depth=keys.perceiver_depth_of(checkpoint),
        gated_layers=keys.gated_layers_of(checkpoint),
    )
    state: dict[str, Any] = keys.rename(names, checkpoint, "checkpoint")
    language_model = dict(tensors("lm/model.safetensors"))
    language_model.pop(keys.LANGUAGE_MODEL_EMBEDDING)
    settings = index()["config"]["language_model"]
    has_norm = any(".q_ln." in name for name in language_model)
    names = keys.language_model_names(layers=settings["n_layers"], qk_norm=has_norm)
    state |= keys.rename(names, language_model, "language model")
    tower = golden_tower().model.state_dict()
    for name, tensor in tower.items():
        short = name.removeprefix("vision_model.")
        if not short.startswith("visual_projection"):
            state[keys.TOWER_PREFIX + short] = tensor
    state[keys.OUTPUT] = state[keys.EMBEDDING]
    return state


def build_model(**changes: Any) -> OpenFlamingoForConditionalGeneration:
    """Build the golden's model with its weights, some of the configuration changed."""
    ids = index()["config"]["ids"]
    config = released.model_config(
        {name: t.shape for name, t in tensors("flamingo/checkpoint.safetensors").items()},
        json.loads((openflamingo_dir() / "lm" / "config.json").read_text()),
        golden_tower().model.config.to_dict(),
        image_token_id=ids["<image>"],
        endofchunk_token_id=ids["<|endofchunk|>"],
    )
    for path, value in changes.items():
        part: Any = config
        *parents, last = path.split("__")
        for parent in parents:
            part = getattr(part, parent)
        assert hasattr(part, last), path
        setattr(part, last, value)
    model = OpenFlamingoForConditionalGeneration(config)
    state = golden_state()
    wanted = {name: state[name] for name in model.state_dict()}
    model.load_state_dict(wanted)
    return model.eval()


@cache
def golden_model() -> OpenFlamingoForConditionalGeneration:
    return build_model()


def build_processor() -> OpenFlamingoProcessor:
    tokenizer = AutoTokenizer.from_pretrained(openflamingo_dir() / "lm")
    size = index()["config"]["vision"]["image_size"]
    return OpenFlamingoProcessor(OpenFlamingoImageProcessor(image_size=size), tokenizer)


def worst(found: Tensor, expected: Tensor, where: Tensor | None = None) -> float:
    """Return the largest difference, at the positions of a mask only if one is given."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = (found.detach().double() - expected.double()).abs()
    if where is not None:
        assert where.dtype == torch.bool
        difference = difference[where]
    return float(difference.max())
