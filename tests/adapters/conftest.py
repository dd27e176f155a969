"""A tiny random LLaVA-1.5, complete as a model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

torch.set_num_threads(1)

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 24,
}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def make_tokenizer() -> LlamaTokenizer:
    """A Llama tokenizer that spells everything; ids <image> and <pad> come last."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-()"
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokenizer = LlamaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    return tokenizer


def make_model(tokenizer: LlamaTokenizer, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        ),
        image_token_index=len(tokenizer) - 1,
    )
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the default, so that answers depend on every part of the input.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single file, float32, key names as today's `save_pretrained` writes them. Do not modify."""
    out = tmp_path_factory.mktemp("tiny") / "llava"
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor = {
        # As published: a centre crop, which the adapter must not follow.
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "size": {"shortest_edge": 16},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor))
    return out


@pytest.fixture
def variant(tiny_llava: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a copy of the tiny LLaVA in another layout, sharding or dtype."""

    def make(
        *, prefix: str = "", shards: int = 1, dtype: torch.dtype = torch.float32, **config: Any
    ) -> Path:
        out = tmp_path / "variant"
        out.mkdir()
        for file in tiny_llava.iterdir():
            if file.suffix != ".safetensors":
                (out / file.name).write_bytes(file.read_bytes())
        content = json.loads((out / "config.json").read_text()) | config
        (out / "config.json").write_text(json.dumps(content))
        state = {}
        for name, tensor in load_file(tiny_llava / "model.safetensors").items():
            if prefix and name.startswith("vision_tower."):
                name = prefix + name.removeprefix("vision_tower.")  # noqa: PLW2901
            state[name] = tensor.to(dtype)
        _save(state, out, shards)
        return out

    return make


def _save(state: dict[str, torch.Tensor], out: Path, shards: int) -> None:
    metadata = {"format": "pt", "note": "kept"}
    if shards == 1:
        save_file(state, out / "model.safetensors", metadata=metadata)
        return
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        # Contiguous ranges of the sorted names: some shards hold no tensor of the tower.
        first, last = shard * len(names) // shards, (shard + 1) * len(names) // shards
        part = {name: state[name] for name in names[first:last]}
        save_file(part, out / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
