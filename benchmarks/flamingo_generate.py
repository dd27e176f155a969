"""Few-shot samples per second of OpenFlamingo, and the memory of the 3B model.

    python benchmarks/flamingo_generate.py                               # tiny, CPU
    python benchmarks/flamingo_generate.py --size 3b --device cuda --dtype bfloat16
    python benchmarks/flamingo_generate.py --memory --shots 16           # 3B, real memory, CPU

Speed: `--queries` pictures, each after `--shots` demonstrations drawn from a pool, answered by beam
search over random weights, in both ways in one process:

one by one  batch 1; tower and resampler run over the demonstrations of every query again;
batched     `--batch` queries at once, padded on the left; the features of the pool are computed
            once (this is counted), then only the queries' own pictures are encoded.

Both use a key/value cache and always make `--new-tokens` tokens. Pixels and token ids are made
beforehand: decoding of pictures and tokenizing are in neither number. The answers of the two ways
are compared: in float32 they are to be the same but for ties (random weights have some).

Memory (`--memory`): the 3B model on the meta device, counted; then with random weights in bfloat16
(or `--dtype`) one forward pass over a prompt with `--shots` demonstrations of 20 tokens. Peak is
the kernel's `ru_maxrss` of this process on the CPU, torch's peak of allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from kuea_mllm.adapters.openflamingo.configuration import (
    OpenFlamingoConfig,
    OpenFlamingoTextConfig,
)
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration

GIB = 2**30
DEMONSTRATION_TOKENS = 20
# Drawn once and repeated, so that filling 2.6 billion weights takes seconds.
_BLOCK = 1 << 20


def tiny_config() -> OpenFlamingoConfig:
    """Return a model of the mini world's size, whose parts keep the proportions of the 3B's."""
    return OpenFlamingoConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=64,
            hidden_act="quick_gelu",
        ),
        text_config=OpenFlamingoTextConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
        ),
        perceiver_depth=2,
        num_latents=8,
        resampler_heads=2,
        resampler_head_dim=32,
        cross_attention_heads=2,
        cross_attention_head_dim=32,
        image_token_id=510,
        endofchunk_token_id=509,
    )


CONFIGS: dict[str, Callable[[], OpenFlamingoConfig]] = {
    "tiny": tiny_config,
    "3b": OpenFlamingoConfig,
}


def build(config: OpenFlamingoConfig, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Build the model with random weights, open gates included, without a second copy of them."""
    with torch.device("meta"):
        model: Any = OpenFlamingoForConditionalGeneration(config).to(dtype)
    constants = {name: buffer.shape for name, buffer in model.named_buffers()}
    model = model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(_BLOCK, generator=generator, device=device).mul_(0.02).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
                continue
            for part in parameter.view(-1).split(_BLOCK):
                part.copy_(block[: len(part)])
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
        for name, shape in constants.items():
            # The only one there is: the numbers of the tower's positions.
            if not name.endswith("position_ids"):
                raise RuntimeError(f"buffer {name} has no known value")
            model.get_buffer(name).copy_(torch.arange(shape[-1])[None])
    return model.eval()


@dataclass
class Work:
    """What both ways are given.

    Attributes:
        pool: Pixels of the demonstrations, (pool, 3, side, side).
        queries: Pixels of the queries, (queries, 3, side, side).
        drawn: Demonstrations of each query, (queries, shots).
        rows: Token ids of each query's prompt.
        pad: Id to fill up with.
    """

    pool: Tensor
    queries: Tensor
    drawn: Tensor
    rows: list[list[int]]
    pad: int


def make_work(config: OpenFlamingoConfig, options: argparse.Namespace) -> Work:
    """Draw pictures and prompts; prompts differ in length, as captions and questions do."""
    generator = torch.Generator().manual_seed(1)
    vision: Any = config.vision_config
    side, words = vision.image_size, min(500, config.endofchunk_token_id)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def demonstration() -> list[int]:
        length = DEMONSTRATION_TOKENS - 5 + int(integers(11, 1))
        text = integers(words, length).tolist()
        return [config.image_token_id, *text, config.endofchunk_token_id]

    texts = [demonstration() for _ in range(options.pool)]
    drawn = integers(options.pool, options.queries, options.shots)
    rows = []
    for chosen in drawn.tolist():
        query = integers(words, 3 + int(integers(6, 1))).tolist()
        before = itertools.chain.from_iterable(texts[n] for n in chosen)
        rows.append([*before, config.image_token_id, *query])
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    return Work(
        pool=torch.randn(options.pool, 3, side, side, generator=generator).to(**place),
        queries=torch.randn(options.queries, 3, side, side, generator=generator).to(**place),
        drawn=drawn,
        rows=rows,
        pad=0,
    )


def one_by_one(model: Any, work: Work, options: argparse.Namespace) -> list[list[int]]:
    """Answer query by query, everything computed anew."""
    answers = []
    for number, row in enumerate(work.rows):
        pixels = torch.cat([work.pool[work.drawn[number]], work.queries[number, None]])
        ids = torch.tensor([row], device=options.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        answers += _generate(model, ids, mask, options, pixel_values=pixels[None])
    return answers


def batched(model: Any, work: Work, options: argparse.Namespace) -> list[list[int]]:
    """Encode each demonstration once, then answer in batches."""
    with torch.inference_mode():
        pool = _encode(model, work.pool, options.batch)
    answers = []
    for start in range(0, len(work.rows), options.batch):
        stop = start + options.batch
        rows = work.rows[start:stop]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), work.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = True
        with torch.inference_mode():
            query = model.encode_images(work.queries[start:stop])
            features = torch.cat([pool[work.drawn[start:stop]], query[:, None]], dim=1)
        ids, mask = ids.to(options.device), mask.to(options.device)
        answers += _generate(model, ids, mask, options, image_features=features)
    return answers


def _encode(model: Any, pixels: Tensor, batch: int) -> Tensor:
    return torch.cat([model.encode_images(part) for part in pixels.split(batch)])


def _generate(
    model: Any, ids: Tensor, mask: Tensor, options: argparse.Namespace, **images: Tensor
) -> list[list[int]]:
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            num_beams=options.beams,
            do_sample=False,
            length_penalty=0.0,
            use_cache=True,
            suppress_tokens=[model.config.image_token_id],
            eos_token_id=model.config.endofchunk_token_id,
            pad_token_id=model.config.endofchunk_token_id,
            **images,
        )
    found: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return found


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return seconds and result."""
    _wait(device)
    started = time.perf_counter()
    result = function()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Run both ways in turn, `--rounds` times, after a warm-up of both."""
    config = CONFIGS[options.size]()
    device = torch.device(options.device)
    model = build(config, dtype=getattr(torch, options.dtype), device=device)
    work = make_work(config, options)
    warm_up = Work(work.pool, work.queries, work.drawn, work.rows[: options.batch], work.pad)
    batched(model, warm_up, options)
    one_by_one(model, Work(**vars(work) | {"rows": work.rows[:2]}), options)
    seconds: dict[str, list[float]] = {"one by one": [], "batched": []}
    answers: dict[str, list[list[int]]] = {}
    for _ in range(options.rounds):
        for name, way in (("one by one", one_by_one), ("batched", batched)):
            took, answers[name] = timed(lambda way=way: way(model, work, options), device)
            seconds[name].append(took)
    rates = {name: options.queries / statistics.median(took) for name, took in seconds.items()}
    pairs = zip(answers["one by one"], answers["batched"], strict=True)
    same = sum(first == second for first, second in pairs) / options.queries
    ratios = [a / b for a, b in zip(seconds["one by one"], seconds["batched"], strict=True)]
    return {
        "samples_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_of_rounds": [round(ratio, 2) for ratio in ratios],
        "same_answers": round(same, 4),
        "peak_gib": _peak(device),
    }


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Count the 3B model on the meta device, then run one prompt through real weights."""
    config, device = CONFIGS[options.size](), torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    with torch.device("meta"):
        meta: Any = OpenFlamingoForConditionalGeneration(config)
    parts = {
        "tower": meta.model.vision_tower,
        "resampler": meta.model.resampler,
        "language model": meta.model.language_model,
    }
    counts = {name: _count(part.parameters()) for name, part in parts.items()}
    blocks = (p for n, p in meta.named_parameters() if ".cross_attention." in n)
    counts["gated blocks"] = _count(blocks)
    counts["language model"] -= counts["gated blocks"]
    counts["all"] = _count(meta.parameters())
    before = _peak(device)
    model = build(config, dtype=dtype, device=device)
    filled = _peak(device)
    text = [7] * DEMONSTRATION_TOKENS
    ids = [config.image_token_id, *text, config.endofchunk_token_id] * options.shots
    ids += [config.image_token_id, *text]
    vision: Any = config.vision_config
    shape = (1, options.shots + 1, 3, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    given = torch.tensor([ids], device=device)
    with torch.inference_mode():
        took, output = timed(
            lambda: model(input_ids=given, pixel_values=pixels, logits_to_keep=1), device
        )
    if not bool(output.logits.isfinite().all()):
        raise RuntimeError("the forward pass gave numbers that are not finite")
    return {
        "parameters": counts,
        "weights_gib": {
            name: round(counts["all"] * size / GIB, 3)
            for name, size in (("float32", 4), ("bfloat16", 2))
        },
        "prompt_tokens": len(ids),
        "images": options.shots + 1,
        "forward_seconds": round(took, 2),
        "peak_gib": {"imports": before, "weights": filled, "forward": _peak(device)},
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / GIB, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line for line in information if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(CONFIGS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--pool", type=int, default=64, help="demonstrations to draw from")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="memory instead of speed")
    options = parser.parse_args(arguments)
    options.size = options.size or ("3b" if options.memory else "tiny")
    options.dtype = options.dtype or ("bfloat16" if options.memory else "float32")
    measure = measure_memory if options.memory else measure_speed
    record = {
        "options": vars(options),
        "hardware": _hardware(torch.device(options.device)),
        "torch": torch.__version__,
        **measure(options),
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
