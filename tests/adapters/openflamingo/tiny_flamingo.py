"""A tiny random OpenFlamingo whose every part has an effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPVisionConfig, GPTNeoXTokenizer

from kuea_mllm.adapters.openflamingo.configuration import (
    OpenFlamingoConfig,
    OpenFlamingoTextConfig,
)
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
from kuea_mllm.adapters.openflamingo.processing import (
    OpenFlamingoImageProcessor,
    OpenFlamingoProcessor,
)

IMAGE, END, PAD = 97, 96, 98
SIDE = 16


def tiny_config(**changes: Any) -> OpenFlamingoConfig:
    settings: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=8,
            projection_dim=16,
        ),
        "text_config": OpenFlamingoTextConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        "perceiver_depth": 2,
        "num_latents": 4,
        "resampler_heads": 2,
        "resampler_head_dim": 8,
        "cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "image_token_id": IMAGE,
        "endofchunk_token_id": END,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return OpenFlamingoConfig(**(settings | changes))


def tiny_model(seed: int = 0, **changes: Any) -> OpenFlamingoForConditionalGeneration:
    torch.manual_seed(seed)
    model = OpenFlamingoForConditionalGeneration(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A freshly made model has closed gates and so small weights that errors would hide.
            if name.endswith("gate"):
                parameter.fill_(0.7)
            elif parameter.dim() > 1 and "vision_tower" not in name:
                parameter.normal_(std=0.25)
    return model.eval()


def tiny_batch(seed: int = 0) -> dict[str, Tensor]:
    """Three rows of unequal length with 3, 1 and 0 images, padded on the left."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(0, END, (count,), generator=generator).tolist()

    rows = [
        [*words(2), IMAGE, *words(4), IMAGE, *words(3), IMAGE, *words(2)],
        [IMAGE, *words(5)],
        words(4),
    ]
    width = max(len(row) for row in rows)
    pixels = torch.randn(3, 3, 3, SIDE, SIDE, generator=generator)
    pixels[1, 1:] = 0
    pixels[2] = 0
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.bool
        ),
        "pixel_values": pixels,
    }


def single_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch as a user would give it alone: no padding, only its own images."""
    mask = batch["attention_mask"][row]
    ids = batch["input_ids"][row][mask][None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = int((ids == IMAGE).sum())
    if images:
        given["pixel_values"] = batch["pixel_values"][row : row + 1, :images]
    return given


def tiny_tokenizer() -> GPTNeoXTokenizer:
    """A GPT-NeoX tokenizer that spells every byte; none of OpenFlamingo's tokens yet."""
    names = ["<|endoftext|>", "<|padding|>", *sorted(ByteLevel.alphabet())]
    return GPTNeoXTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[])


def tiny_processor() -> OpenFlamingoProcessor:
    return OpenFlamingoProcessor(OpenFlamingoImageProcessor(image_size=SIDE), tiny_tokenizer())


# What the released code builds whatever the configuration says.
RELEASED_HEADS = {
    f"{part}_{what}": value
    for part in ("resampler", "cross_attention")
    for what, value in (("heads", 8), ("head_dim", 64))
}


def save_tiny_base(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a complete model directory."""
    processor = tiny_processor()
    text = tiny_config().text_config.to_dict()
    text.update(vocab_size=len(processor.tokenizer), max_position_embeddings=256)
    model = tiny_model(
        seed,
        text_config=text,
        image_token_id=processor.image_token_id,
        endofchunk_token_id=processor.endofchunk_token_id,
        eos_token_id=processor.endofchunk_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        **changes,
    )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
