"""Questions per second of an evaluation, against lmms-eval's own model class.

    python benchmarks/evaluation.py                              # tiny, CPU, 5 and 18 per image
    python benchmarks/evaluation.py --size 7b --device cuda --dtype bfloat16 --rounds 5

One LLaVA with random weights and the questions of `--images` pictures (JPEG, 640 x 480, decoded for
every question, as data sets do), `--per-image` questions about each, in all ways in turn:

stock                lmms-eval's `llava_hf` (the simple variant, batch 1: it refuses any other)
ours                 batch `--batch`, what comes before the question computed once per picture
ours, not shared     the same batch, every question computed from its picture on
ours, not batched    batch 1, shared
ours, neither        batch 1, not shared

The tiny model has the real one's token counts (576 for a picture) and little width. All ways write
`--new-tokens` tokens: the row of the end token in the output layer is zero. Prompts and pictures
are those of each side: `llava_hf` crops where we pad, and words its template a little differently.
Loading of libraries and model is in no number. `ratio` is one of wall times; `cpu_ratio`, one of
the CPU seconds of the process, is the one to read where other work runs on the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from kuea_mllm.adapters.llava.images import PaddedImages
from kuea_mllm.adapters.llava.runtime import LlavaRuntime
from kuea_mllm.evaluation.answering.answers import answer_questions
from kuea_mllm.evaluation.answering.questions import GenerationSettings, PendingQuestion
from kuea_mllm.evaluation.answering.session import Session
from kuea_mllm.miniworld.vocabularies import build_llava_tokenizer
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD

_BLOCK = 1 << 20
_QUESTION = "Is there a digit in the image? Which one is left of it?"
_WORDS = [*_QUESTION.split(), *["colour"] * 6]
VISION: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3},
    "7b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
}
TEXT: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
}
HEADS = {"tiny": (2, 4), "7b": (16, 32)}


def build_config(size: str, vocabulary: int, image_token: int) -> LlavaConfig:
    """Return LLaVA-1.5's configuration, in its own size or narrow."""
    vision_heads, text_heads = HEADS[size]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            **VISION[size],
            num_attention_heads=vision_heads,
            image_size=336,
            patch_size=14,
            hidden_act="quick_gelu",
        ),
        text_config=LlamaConfig(
            **TEXT[size],
            vocab_size=32064 if size == "7b" else vocabulary,
            num_attention_heads=text_heads,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=image_token,
    )


def build_model(config: LlavaConfig, end: int, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Build the model with random weights, without a second copy of them."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config).to(dtype)
    model = model.to_empty(device=device)
    # What is no parameter has to be computed again: frequencies and numbers of positions.
    with torch.device(device):
        rotary = type(model.model.language_model.rotary_emb)(config.text_config)
    model.model.language_model.rotary_emb = rotary
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(_BLOCK, generator=generator, device=device).mul_(0.02).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(_BLOCK):
                part.copy_(block[: len(part)])
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
                module.weight.fill_(1)
        model.lm_head.weight[end].zero_()
    return model.eval()


@dataclass(frozen=True)
class Work:
    """What all ways are given."""

    pictures: list[bytes]
    prompts: list[str]
    per_image: int

    def load(self, number: int) -> list[Image.Image]:
        """Decode the picture of a question."""
        return [Image.open(io.BytesIO(self.pictures[number // self.per_image]))]


def make_work(images: int, per_image: int) -> Work:
    """Draw pictures, and questions of different lengths."""
    generator = torch.Generator().manual_seed(1)
    pictures = []
    for _ in range(images):
        noise = torch.randint(0, 256, (48, 64, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(noise.numpy()).resize((640, 480), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    lengths = torch.randint(6, 19, (images * per_image,), generator=generator).tolist()
    return Work(pictures, [" ".join(_WORDS[:length]) for length in lengths], per_image)


def stock_class() -> Any:
    """Import lmms-eval's `llava_hf`, which wants a video library even for pictures."""
    if "decord" not in sys.modules:
        decord = types.ModuleType("decord")
        vars(decord).update(VideoReader=None, cpu=None)
        sys.modules["decord"] = decord
    from lmms_eval.models.simple import llava_hf

    return llava_hf


def make_stock(model: Any, folder: Path, device: torch.device) -> Any:
    """Make lmms-eval's model class around our model, from files without weights."""
    module = stock_class()
    where = str(device) if device.type == "cpu" else "cuda:0"
    with mock.patch.object(
        module.LlavaForConditionalGeneration, "from_pretrained", lambda *_, **__: model
    ):
        return module.LlavaHf(
            pretrained=str(folder), device=where, device_map=where, batch_size=1, dtype="auto"
        )


def ask_stock(stock: Any, work: Work, new_tokens: int) -> list[str]:
    """Answer by lmms-eval's class; it wants requests with dictionaries of their own."""
    stock.task_dict = {"task": {"test": list(range(len(work.prompts)))}}
    requests = [
        types.SimpleNamespace(
            args=(prompt, {"max_new_tokens": new_tokens}, work.load, number, "task", "test")
        )
        for number, prompt in enumerate(work.prompts)
    ]
    answers: list[str] = stock.generate_until(requests)
    return answers


def ask_ours(
    runtime: LlavaRuntime, work: Work, new_tokens: int, *, batch: int, shared: bool
) -> list[str]:
    """Answer by the code behind `kuea-mllm eval`."""
    settings = GenerationSettings(max_new_tokens=new_tokens)
    questions = [
        PendingQuestion(
            "task",
            number,
            prompt,
            partial(work.load, number),
            settings,
            image=str(number // work.per_image),
        )
        for number, prompt in enumerate(work.prompts)
    ]
    session = Session(runtime, "random", show_progress=False, shared_prefix=shared)
    runtime.prefixes.forget()
    answers = answer_questions(session, batch, questions)
    if session.failures:
        raise RuntimeError(session.failures[0].error)
    return answers


def measure(ways: dict[str, Callable[[], list[str]]], rounds: int, device: torch.device) -> Any:
    """Run all ways in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[str]] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            _wait(device)
            started, started_busy = time.perf_counter(), time.process_time()
            answers[name] = way()
            _wait(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - started_busy)
    count = len(answers["stock"])
    reference = answers["ours, neither"]
    return {
        name: {
            "questions_per_second": round(count / statistics.median(took), 2),
            "ratio": _spread(seconds["stock"], took),
            "cpu_ratio": _spread(busy["stock"], busy[name]),
            "same_answers": None
            if name == "stock"
            else sum(a == b for a, b in zip(answers[name], reference, strict=True)) / count,
        }
        for name, took in seconds.items()
    }


def _spread(stock: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Return median, lowest and highest of the rounds' ratios."""
    ratios = [a / b for a, b in zip(stock, ours, strict=True)]
    return [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build everything and measure for each number of questions per picture."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    tokenizer = build_llava_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = build_config(options.size, len(tokenizer), image_token)
    model = build_model(config, tokenizer.eos_token_id, dtype=dtype, device=device)
    images = PaddedImages(336, CLIP_MEAN, CLIP_STD)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).save_pretrained(folder)
        stock = make_stock(model, folder, device)
        runtime = LlavaRuntime(model, tokenizer, images, "random weights")
        for per_image in options.per_image:
            work = make_work(options.images, per_image)
            ours = partial(ask_ours, runtime, work, options.new_tokens)
            ways: dict[str, Callable[[], list[str]]] = {
                "stock": partial(ask_stock, stock, work, options.new_tokens),
                "ours": partial(ours, batch=options.batch, shared=True),
                "ours, not shared": partial(ours, batch=options.batch, shared=False),
                "ours, not batched": partial(ours, batch=1, shared=True),
                "ours, neither": partial(ours, batch=1, shared=False),
            }
            results[per_image] = measure(ways, options.rounds, device)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(VISION), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--per-image", type=int, nargs="+", default=[5, 18])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    record = {
        "options": vars(options),
        "hardware": _hardware(torch.device(options.device)),
        "torch": torch.__version__,
        "questions_per_image": run(options),
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
