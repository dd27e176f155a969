"""The parts of a tiny random LLaVA-1.5, and a complete directory of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

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


def write_tiny_llava(out: Path, seed: int = 0) -> None:
    """Write a directory as `save_pretrained` does."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed).save_pretrained(out)
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
