"""Tiny LLaVA-1.5 models in their authors' layout, in every form they are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 24,
}
TEXT: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
    "tie_word_embeddings": False,
}
PREFIX = "model.vision_tower.vision_tower.vision_model."
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def vocabulary() -> dict[str, int]:
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-()\n"
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    return {name: i for i, name in enumerate(names)}


def _random_state(model: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        # Around one for the norms, around zero for the rest.
        name: ("norm" in name and name.endswith("weight"))
        + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def make_tower(out: Path, *, seed: int = 0, has_projection: bool = True) -> Path:
    """A CLIP tower as a Hugging Face directory."""
    config = CLIPVisionConfig(**VISION)
    model = CLIPVisionModelWithProjection(config) if has_projection else CLIPVisionModel(config)
    state = _random_state(model, seed)
    out.mkdir(parents=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(
        json.dumps(config.to_dict() | {"model_type": config.model_type})
    )
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(settings))
    return out


def tower_body(directory: Path) -> dict[str, Tensor]:
    """The weights of such a directory below `vision_model.`, without projection."""
    from safetensors.torch import load_file

    state = load_file(directory / "model.safetensors")
    return {
        name.removeprefix("vision_model."): tensor
        for name, tensor in state.items()
        if not name.startswith("visual_projection")
    }


def language_state(seed: int = 0) -> dict[str, Tensor]:
    """Language model and projector under the original names."""
    config = LlamaConfig(vocab_size=len(vocabulary()), **TEXT)
    state = _random_state(LlamaForCausalLM(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    width, tokens = TEXT["hidden_size"], VISION["hidden_size"]
    for name, shape in {
        "0.weight": (width, tokens),
        "0.bias": (width,),
        "2.weight": (width, width),
        "2.bias": (width,),
    }.items():
        state[f"model.mm_projector.{name}"] = 0.3 * torch.randn(shape, generator=generator)
    return state


def make_original(
    out: Path,
    tower: Path,
    *,
    inside: bool = True,
    pickled: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Tensor] | None = None,
    leave_out: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """A complete directory in the original layout; `config` overrides keys of `config.json`."""
    out.mkdir(parents=True)
    state = language_state()
    if inside:
        state |= {PREFIX + name: tensor for name, tensor in tower_body(tower).items()}
    state = {name: tensor.to(dtype) for name, tensor in state.items()} | (extra or {})
    _save({n: t for n, t in state.items() if n not in leave_out}, out, pickled, shards)
    content = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": len(vocabulary()),
        **TEXT,
        "mm_vision_tower": str(tower),
        "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    content = {k: v for k, v in (content | config).items() if v != "absent"}
    (out / "config.json").write_text(json.dumps(content))
    LlamaTokenizer(vocab=vocabulary(), merges=[]).save_pretrained(out)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "model_max_length": 2048}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out


def _save(state: dict[str, Tensor], out: Path, pickled: bool, shards: int) -> None:
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    # The tower comes last, as in the published shards.
    names = sorted(state, key=lambda name: (name.startswith(PREFIX), name))
    places: dict[str, str] = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}{suffix}" if shards > 1 else stem + suffix
        content = {name: state[name].contiguous() for name in part}
        if pickled:
            torch.save(content, out / file)
        else:
            save_file(content, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (out / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
