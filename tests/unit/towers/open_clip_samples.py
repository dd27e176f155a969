"""Tiny open_clip models, and repositories of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from transformers import CLIPConfig, CLIPModel

TEXT_WIDTH = 64
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 16, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
OPENAI_PIXELS = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.27, 0.26, 0.275]}
SIGLIP_PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}


@register_model
def vit_sample_siglip(**settings: Any) -> VisionTransformer:
    """A tiny SigLIP trunk that open_clip finds by name, 20 pixels for patches of 8."""
    return siglip_trunk(20, **settings)


@register_model
def vit_sample_siglip_16(**settings: Any) -> VisionTransformer:
    """The same for 16 pixels, which leave no rest."""
    return siglip_trunk(16, **settings)


def siglip_trunk(side: int, **settings: Any) -> VisionTransformer:
    for unused in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        settings.pop(unused, None)
    sizes: dict[str, Any] = {"img_size": side, "patch_size": 8, "embed_dim": 32, "num_heads": 4}
    return VisionTransformer(
        **sizes, depth=2, mlp_ratio=1.5, class_token=False, act_layer="gelu_tanh", **settings
    )


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "quick_gelu": (
        {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
        OPENAI_PIXELS,
        "quick_gelu",
    ),
    "gelu": (
        {"embed_dim": 24, "vision_cfg": {**VISION, "mlp_ratio": 2.0}, "text_cfg": TEXT},
        {"mean": 0.4, "std": 0.3, "interpolation": "bicubic", "resize_mode": "squash"},
        "gelu",
    ),
    "tanh_and_eps": (
        {
            "embed_dim": 24,
            "custom_text": True,
            "vision_cfg": {
                **VISION,
                "act_kwargs": {"approximate": "tanh"},
                "norm_kwargs": {"eps": 1e-2},
            },
            "text_cfg": TEXT,
        },
        OPENAI_PIXELS,
        "gelu_pytorch_tanh",
    ),
    "siglip": (
        {
            "embed_dim": 32,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 20,
                "timm_model_name": "vit_sample_siglip",
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": TEXT,
        },
        SIGLIP_PIXELS,
        "gelu_pytorch_tanh",
    ),
    "siglip_16": (
        {
            "embed_dim": 32,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 16,
                "timm_model_name": "vit_sample_siglip_16",
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": TEXT,
        },
        SIGLIP_PIXELS,
        "gelu_pytorch_tanh",
    ),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    settings = dict(MODELS[name][0])
    is_custom = settings.pop("custom_text", False)
    model_class = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    model = model_class(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_repository(directory: Path, name: str, *, suffix: str = ".safetensors") -> Any:
    """Write a repository as open_clip's save_for_hf does, without its tokenizer."""
    model = build(name)
    settings, pixels, _ = MODELS[name]
    directory.mkdir(exist_ok=True)
    content = {"model_cfg": settings, "preprocess_cfg": pixels}
    (directory / "open_clip_config.json").write_text(json.dumps(content))
    if suffix == ".safetensors":
        save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    else:
        torch.save(model.state_dict(), directory / "open_clip_pytorch_model.bin")
    return model


def edit(directory: Path, section: str, **changes: Any) -> None:
    path = directory / "open_clip_config.json"
    content = json.loads(path.read_text())
    target = content["model_cfg"]["vision_cfg"] if section == "vision_cfg" else content[section]
    target.update(changes)
    path.write_text(json.dumps(content))


def openai_model(*, quick_gelu: bool = True, **text: Any) -> Any:
    """Return a tiny CLIP of OpenAI's proportions, as open_clip builds it."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"context_length": 8, "vocab_size": 16, "width": TEXT_WIDTH}
    model = open_clip.CLIP(
        24,
        vision_cfg={"image_size": 16, "layers": 2, "width": 64, "patch_size": 8},
        text_cfg={**settings, "heads": 1, "layers": 1, **text},
        quick_gelu=quick_gelu,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def hf_model(**text: Any) -> CLIPModel:
    settings = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 16,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        # 2 makes transformers take the token with the largest id as the end, as OpenAI does.
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(2)
    config = CLIPConfig(text_config={**settings, **text}, vision_config=vision, projection_dim=24)
    return CLIPModel(config).eval()
