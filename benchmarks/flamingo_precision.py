"""How far OpenFlamingo in bfloat16 or float16 is from itself in float32.

    python benchmarks/flamingo_precision.py                          # random weights, CPU
    python benchmarks/flamingo_precision.py --model models/flamingo --device cuda

Without `--model`: a language model of width 512 and 8 layers with a gated block before each, behind
a tower of width 256 and 6 layers, random weights that keep the size of what passes through them,
gates half open. Text and pixels are random: `--rows` prompts of `--shots` demonstrations and a
query. The weights are rounded to the dtype and everything runs in it, as with `--dtype` of the
runtime. Over all positions and the whole vocabulary of logits:

error       root mean square of the difference, relative to that of the float32 logits
cosine      smallest over positions
same_token  share of positions whose likeliest next token is the same. Random weights are hardly
            ever sure of theirs, so that this is a lower bound for trained ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from kuea_mllm.adapters.openflamingo.configuration import (
    OpenFlamingoConfig,
    OpenFlamingoTextConfig,
)
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration

DEMONSTRATION_TOKENS = 20


def middle_config() -> OpenFlamingoConfig:
    """Return a model between the tests' and the 3B's, deep and wide enough to add up rounding."""
    return OpenFlamingoConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            projection_dim=256,
            hidden_act="quick_gelu",
        ),
        text_config=OpenFlamingoTextConfig(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            max_position_embeddings=2048,
        ),
        image_token_id=4094,
        endofchunk_token_id=4093,
    )


def random_model(config: OpenFlamingoConfig) -> Any:
    """Build a model whose every part has an effect."""
    torch.manual_seed(0)
    model: Any = OpenFlamingoForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
            elif parameter.dim() > 1:
                # So that a layer's output is about as large as its normalised input.
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def make_prompts(config: Any, *, rows: int, shots: int) -> dict[str, Tensor]:
    """Draw few-shot prompts."""
    generator = torch.Generator().manual_seed(1)
    words = min(config.image_token_id, config.endofchunk_token_id)
    chunk = DEMONSTRATION_TOKENS + 2
    ids = torch.randint(0, words, (rows, chunk * (shots + 1)), generator=generator)
    ids[:, ::chunk] = config.image_token_id
    ids[:, chunk - 1 : chunk * shots : chunk] = config.endofchunk_token_id
    side = config.vision_config.image_size
    pixels = torch.randn(rows, shots + 1, 3, side, side, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels}


@torch.inference_mode()
def logits_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Run the model in its dtype on its device; return float32 logits on the CPU."""
    moved = {key: tensor.to(model.device) for key, tensor in given.items()}
    moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    logits: Tensor = model(**moved).logits
    return logits.float().cpu()


def deviation(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Compare logits, (..., vocabulary), as the head of this file says."""
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1).min()
    same = (found.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean()
    return {
        "error": round(float(error), 5),
        "cosine": round(float(cosine), 6),
        "same_token": round(float(same), 4),
    }


def measure(model: Any, dtypes: Sequence[torch.dtype], given: dict[str, Tensor]) -> dict[str, Any]:
    """Run a float32 model as it is and rounded to each dtype."""
    expected = logits_of(model, given)
    return {
        str(dtype).removeprefix("torch."): deviation(
            logits_of(copy.deepcopy(model).to(dtype), given), expected
        )
        for dtype in dtypes
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory in Hugging Face form")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--shots", type=int, default=4)
    options = parser.parse_args(arguments)
    if options.model is None:
        model = random_model(middle_config())
    else:
        loader: Any = OpenFlamingoForConditionalGeneration
        model = loader.from_pretrained(options.model, dtype=torch.float32).eval()
    model = model.to(options.device)
    given = make_prompts(model.config, rows=options.rows, shots=options.shots)
    record = {
        "model": str(options.model or "random, width 512, 8 layers"),
        "device": options.device,
        "positions": given["input_ids"].numel(),
        "torch": torch.__version__,
        **measure(model, (torch.bfloat16, torch.float16), given),
    }
    json.dump(record, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
