"""Models of three sizes with random weights, and directories for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.quantizers import AutoHfQuantizer

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.targets import linear_targets


@dataclass(frozen=True)
class Size:
    """Model and batches of one setting.

    Attributes:
        text: Of the language model.
        vision: Of the tower.
        max_length: Longest row in tokens.
        rank: Of the LoRA layers.
        micro_batch: Samples, or packed rows, at once.
        accumulation: Micro-batches in an update.
        samples: In one pass.
        is_full: Whether every sample has `max_length` tokens.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    max_length: int
    rank: int
    micro_batch: int
    accumulation: int
    samples: int
    is_full: bool = False


def _llama(width: int, inner: int, layers: int, heads: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": rows,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def _tower(image: int, patch: int, width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "image_size": image,
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }


SIZES = {
    "tiny": Size(_llama(64, 128, 2, 4, 512), _tower(16, 4, 32, 3, 4), 128, 8, 4, 2, samples=32),
    "mid": Size(
        _llama(512, 1376, 8, 8, 32064), _tower(112, 14, 256, 4, 4), 256, 32, 4, 2, samples=8
    ),
    "7b": Size(
        _llama(4096, 11008, 32, 32, 32064),
        _tower(336, 14, 1024, 24, 16),
        2048,
        128,
        1,
        4,
        samples=16,
        is_full=True,
    ),
}


def write_base(folder: Path, size: Size) -> None:
    """Write a model directory without weights: configuration, tokenizer, image settings."""
    words = size.text["vocab_size"] - 64
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    names += [chr(code) for code in range(ord("!"), ord("~") + 1)]
    names += [f"word{number}" for number in range(words - len(names))]
    tokenizer = LlamaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision),
        text_config=LlamaConfig(**size.text),
        image_token_index=len(tokenizer) - 1,
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    side = size.vision["image_size"]
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def random_model(base: Path, *, dtype: str, device: str, quantization: object | None) -> Any:
    """Build the model of a directory on the device, with random weights, none trainable."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration._from_config(
            LlavaConfig.from_pretrained(base), dtype=getattr(torch, dtype)
        )
    model.eval().requires_grad_(False)
    if quantization is not None:
        _quantise(model, LlavaAdapter().tuning_parts(base), quantization, device)
    return model


def _quantise(model: nn.Module, parts: TuningParts, config: Any, device: str) -> None:
    """Put NF4 layers in the place of the language model's linear ones, as loading would."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, layer in linear_targets(model, parts).items():
        small = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            device="meta",
        )
        small.weight = Params4bit(
            layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=small
        ).to(device)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, small)
    # What `from_pretrained` would have noted, and PEFT and Trainer look for.
    noted: Any = model
    noted.is_loaded_in_4bit = noted.is_quantized = True
    noted.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)


class RandomLlava(LlavaAdapter):
    """LLaVA whose weights are not read from the directory but made."""

    def load_for_tuning(
        self, base: Path, *, dtype: str, device: str, quantization: object | None = None
    ) -> nn.Module:
        """Return the random model."""
        model: nn.Module = random_model(base, dtype=dtype, device=device, quantization=quantization)
        return model
