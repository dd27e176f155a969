"""Speed and memory of a LoRA tuning: stock PEFT and Trainer against ours, and what was predicted.

python benchmarks/lora_step.py --size tiny
python benchmarks/lora_step.py --size mid
python benchmarks/lora_step.py --size 7b --device cuda [--quantization nf4]   # also --packing
python benchmarks/lora_step.py --padding     # arithmetic only: padding of the orders

Both train the same model on the same samples, in turn, several times; the first pass over the
samples warms up, the second is timed. Weights, tokens and pixels are random, and samples are ready
in memory: reading them has a benchmark of its own (mixture.py).

stock: what a user writes first: `get_peft_model` with target_modules="all-linear", then
    `transformers.Trainer` with its defaults: random order, padding to the longest, all logits.
ours: the trainer that `kuea-mllm lora` builds.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.planning.cards import card_or_device, find_card
from kuea_mllm.planning.tuning import plan_tuning
from kuea_mllm.training.checkpoints import CheckpointStore
from kuea_mllm.training.run_directory import RunDirectory
from kuea_mllm.tuning.assemble import assemble
from kuea_mllm.tuning.collate import IGNORED
from kuea_mllm.tuning.examples import Example
from kuea_mllm.tuning.inputs import TuningInputs
from kuea_mllm.tuning.packing import PackedBatchSampler, PackedExamples, padding_share
from kuea_mllm.tuning.quantised import quantization_config
from kuea_mllm.tuning.sampler import GroupedBatchSampler

PLACEHOLDER = -200


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

# Records by source as the mixture's authors counted them, whether they have an image, and an
# ASSUMED median and spread (of the logarithm) of the tokens of their text.
SOURCES = (
    (157_712, True, 260, 0.45),  # LLaVA-Instruct
    (82_783, True, 240, 0.40),  # VQAv2
    (8_998, True, 90, 0.20),  # OKVQA
    (66_160, True, 110, 0.20),  # A-OKVQA
    (48_447, True, 330, 0.60),  # RefCOCO
    (72_140, True, 280, 0.45),  # GQA
    (80_000, True, 220, 0.30),  # OCR-VQA
    (21_953, True, 85, 0.20),  # TextCaps
    (86_417, True, 480, 0.60),  # Visual Genome
    (40_688, False, 1100, 0.70),  # ShareGPT
)
TOKENS_PER_WORD = 1.35


def mixture_lengths(
    count: int, *, max_length: int, image_tokens: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return signed lengths in words and lengths in tokens of a synthetic mixture.

    Args:
        count: Samples; the sources keep their shares.
        max_length: Where tokens are cut; texts are shortened with it from 2048.
        image_tokens: Of one image.
        seed: Of the numbers.
    """
    numbers = np.random.default_rng(seed)
    records = np.array([source[0] for source in SOURCES])
    source = numbers.choice(len(SOURCES), count, p=records / records.sum())
    has_image = np.array([each[1] for each in SOURCES])[source]
    median, spread = (np.array([each[n] for each in SOURCES])[source] for n in (2, 3))
    text = median * np.exp(spread * numbers.standard_normal(count)) * max_length / 2048
    words = np.maximum(1, text / TOKENS_PER_WORD * numbers.uniform(0.9, 1.1, count))
    tokens = np.minimum(np.maximum(8, text) + has_image * image_tokens, max_length)
    return np.where(has_image, words, -words).astype(np.int64), tokens.astype(np.int64)


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


class Samples(Dataset[Example]):
    """Random samples in memory, and what the trainer asks a mixture for."""

    source = folder = Path("synthetic")

    def __init__(self, size: Size, words: int, image_tokens: int) -> None:
        self.signed, self.tokens = mixture_lengths(
            size.samples, max_length=size.max_length, image_tokens=image_tokens
        )
        if size.is_full:
            self.signed = np.full(size.samples, size.max_length)
            self.tokens = np.full(size.samples, size.max_length)
        numbers = torch.Generator().manual_seed(0)
        side = size.vision["image_size"]
        self.rows: list[Example] = []
        for position, total in enumerate(self.tokens.tolist()):
            has_image = bool(self.signed[position] > 0)
            text = total - has_image * image_tokens
            ids = torch.randint(260, words, (text,), generator=numbers).tolist()
            labels = [IGNORED] * (text // 2) + ids[text // 2 :]
            pixels = torch.randn(3, side, side, generator=numbers) if has_image else None
            if has_image:
                ids, labels = [PLACEHOLDER, *ids], [IGNORED, *labels]
            self.rows.append(Example(position, ids, labels, pixels, 0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]

    def lengths(self) -> NDArray[np.int64]:
        """Return the words of every sample, negative without an image."""
        return self.signed

    def name(self, index: int) -> str:
        """Return how messages call one sample."""
        return f"sample {index}"


class SyntheticInputs(TuningInputs):
    """Inputs whose samples are ready."""

    @property
    def examples(self) -> Any:
        """The samples by position, or by the positions of a row."""
        samples: Any = self.mixture
        return PackedExamples(samples) if self.recipe.data.packing else samples


class Clock(TrainerCallback):
    """Times the second pass over the samples."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._epochs = 0
        self._started = 0.0
        self.seconds = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Start at the second."""
        self._epochs += 1
        if self._epochs == 2:
            _synchronise(self._device)
            self._started = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        _synchronise(self._device)
        self.seconds = time.perf_counter() - self._started


@dataclass(frozen=True)
class Setting:
    """Everything that the variants share."""

    size: Size
    base: Path
    device: str
    dtype: str
    quantization: Literal["none", "nf4"]
    packing: bool

    def recipe(self) -> LoraRecipe:
        """Return the recipe of ours."""
        size = self.size
        content = {
            "kind": "lora",
            "model": {"path": str(self.base), "quantization": self.quantization},
            "data": {
                "file": "synthetic",
                "max_length": size.max_length,
                "packing": self.packing,
                "workers": 0,
            },
            "lora": {"rank": size.rank, "alpha": 2 * size.rank},
            "optim": {
                "micro_batch_size": size.micro_batch,
                "accumulation": size.accumulation,
                "epochs": 2,
            },
            "runtime": {"device": self.device, "dtype": self.dtype, "log_every": 10_000},
        }
        return LoraRecipe.parse(content, origin="benchmark").resolved()

    def samples(self) -> Samples:
        """Return the samples."""
        reading = LlavaAdapter().tuning_format(self.base, max_length=self.size.max_length)
        parts = LlavaAdapter().tuning_parts(self.base)
        return Samples(self.size, parts.vocabulary_size, reading.tokens_per_image)


def ours(setting: Setting, samples: Samples, folder: Path) -> float:
    """Return the seconds of one pass of our trainer."""
    adapter, recipe = RandomLlava(), setting.recipe()
    reading = adapter.tuning_format(setting.base, max_length=setting.size.max_length)
    mixture: Any = samples
    inputs = SyntheticInputs(
        recipe=recipe,
        base=setting.base,
        adapter=adapter,
        tuner=adapter,
        parts=adapter.tuning_parts(setting.base),
        format=replace(reading, encoder=_Encoder(reading.encoder.pad_token_id)),
        mixture=mixture,
        images=None,
        identity={},
        token_counts=samples.tokens.astype(np.int32) if setting.packing else None,
    )
    store = CheckpointStore(folder / "checkpoints", keep=1)
    run = RunDirectory(folder, folder, store, checkpoint=None, state={}, notes=[])
    clock = Clock(torch.device(setting.device))
    made = assemble(inputs, run, progress=False)
    made.trainer.bind_checkpoints(store, dict)
    made.trainer.add_callback(clock)
    made.trainer.train()
    made.metrics.close()
    store.close()
    return clock.seconds


@dataclass(frozen=True)
class _Encoder:
    """What a batch needs to know of an encoder."""

    pad_token_id: int
    placeholder: int = PLACEHOLDER
    max_length: int = 0

    def encode(self, record: Mapping[str, Any]) -> Any:
        raise NotImplementedError("samples are encoded already")


def stock(setting: Setting, samples: Samples, folder: Path) -> float:
    """Return the seconds of one pass of PEFT and Trainer with their defaults."""
    size = setting.size
    model = random_model(
        setting.base,
        dtype=setting.dtype,
        device=setting.device,
        quantization=quantization_config(
            setting.quantization,
            LlavaAdapter().tuning_parts(setting.base),
            dtype=getattr(torch, setting.dtype),
        ),
    )
    if setting.quantization != "none":
        model = peft.prepare_model_for_kbit_training(model)
    wrapped: Any = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=size.rank,
            lora_alpha=2 * size.rank,
            lora_dropout=0.05,
            target_modules="all-linear",
        ),
    )
    clock = Clock(torch.device(setting.device))
    reading = LlavaAdapter().tuning_format(setting.base, max_length=size.max_length)
    trainer = Trainer(
        model=wrapped,
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=size.micro_batch,
            gradient_accumulation_steps=size.accumulation,
            learning_rate=2e-4,
            bf16=setting.dtype == "bfloat16",
            gradient_checkpointing=True,
            use_cpu=setting.device == "cpu",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=_Spliced(samples, reading.image_token_id, reading.tokens_per_image),
        data_collator=_padded(reading.encoder.pad_token_id),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return clock.seconds


class _Spliced(Dataset[dict[str, Any]]):
    """Samples as LLaVA's own processor gives them: the image's token once for each patch."""

    def __init__(self, samples: Samples, token: int, times: int) -> None:
        self._samples, self._image, self._labels = samples, [token] * times, [IGNORED] * times

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._samples[index]
        ids, labels = sample.input_ids, sample.labels
        if sample.pixels is not None:
            ids, labels = self._image + ids[1:], self._labels + labels[1:]
        return {"input_ids": ids, "labels": labels, "pixel_values": sample.pixels}


def _padded(pad: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        def together(name: str, value: int) -> Tensor:
            tensors = [torch.tensor(row[name]) for row in rows]
            return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        batch = {"input_ids": together("input_ids", pad), "labels": together("labels", IGNORED)}
        batch["attention_mask"] = (batch["input_ids"] != pad).long()
        if pixels := [row["pixel_values"] for row in rows if row["pixel_values"] is not None]:
            batch["pixel_values"] = torch.stack(pixels)
        return batch

    return collate


VARIANTS: dict[str, Callable[[Setting, Samples, Path], float]] = {"stock": stock, "ours": ours}


def measure(setting: Setting, variant: str) -> dict[str, float]:
    """Return tokens per second and peak memory of one variant, measured once.

    On the CPU in a process of its own, whose memory is its own: what it took beyond the imports.
    """
    if setting.device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = _measure(setting, variant)
        return found | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_measure_in_child, args=(there, setting, variant))
    process.start()
    there.close()
    try:
        result: dict[str, float] = here.recv()
    except EOFError:
        raise SystemExit(f"{variant} failed") from None
    process.join()
    return result


def _measure_in_child(pipe: Any, setting: Setting, variant: str) -> None:
    before = _resident()
    found = _measure(setting, variant)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(found | {"peak_gib": (peak - before) / 2**30})
    pipe.close()


def _measure(setting: Setting, variant: str) -> dict[str, float]:
    samples = setting.samples()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = VARIANTS[variant](setting, samples, Path(folder))
    return {"tokens_per_second": int(samples.tokens.sum()) / seconds}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def predicted(setting: Setting) -> dict[str, float]:
    """Return what the planner says of our variant on a GPU, without its allowance for CUDA."""
    card = find_card("rtx4090")
    if setting.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        card = card_or_device(properties.name, properties.total_memory)
    plan = plan_tuning(setting.recipe(), base=setting.base, card=card)
    parts = [part.bytes for part in plan.memory if part.name != "allowance"]
    return {"all_gib": plan.memory_gib, "tensors_gib": sum(parts) / 2**30}


def padding_table(count: int = 665_298) -> dict[str, Any]:
    """Return the padding of the orders for a mixture as large as LLaVA's; arithmetic only."""
    lengths, tokens = mixture_lengths(count, max_length=2048, image_tokens=576)
    shuffled = np.random.default_rng(1).permutation(count)
    rows: dict[str, Any] = {"mean_tokens": float(tokens.mean()), "padding": {}}
    for batch_size, chunks in ((16, 8), (4, 32)):
        grouped, alike = (
            GroupedBatchSampler(
                lengths,
                batch_size=batch_size,
                world_size=1,
                accumulation=chunks,
                alike_in_length=is_alike,
            )
            for is_alike in (False, True)
        )
        mixed = np.array_split(tokens[shuffled], range(batch_size, count, batch_size))
        rows["padding"][str(batch_size)] = {
            "random": padding_share([batch.tolist() for batch in mixed]),
            "grouped": padding_share([tokens[batch].tolist() for batch in grouped]),
            "by length": padding_share([tokens[batch].tolist() for batch in alike]),
        }
    started = time.perf_counter()
    packed = PackedBatchSampler(
        lengths, tokens, max_length=2048, batch_size=1, world_size=1, accumulation=32
    )
    rows["packing"] = {
        "rows": len(packed.rows),
        "filled": float(tokens.sum() / (2048 * len(packed.rows))),
        "samples_per_row": count / len(packed.rows),
        "seconds": time.perf_counter() - started,
    }
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--packing", action="store_true", help="ours with packed rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="in one pass; default: of the size")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--padding", action="store_true", help="padding of the orders, no model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.padding:
        print(json.dumps(padding_table(options.samples or 665_298), indent=2))
        return
    size = SIZES[options.size]
    if options.samples:
        size = replace(size, samples=options.samples)
    if options.packing:
        size = replace(size, is_full=False)
    is_cuda = options.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), size)
        setting = Setting(
            size=size,
            base=Path(folder),
            device=options.device,
            dtype=options.dtype or ("bfloat16" if is_cuda else "float32"),
            quantization=options.quantization,
            packing=options.packing,
        )
        rounds = [
            {name: measure(setting, name) for name in VARIANTS} for _ in range(options.rounds)
        ]
        record = {
            "size": options.size,
            "device": torch.cuda.get_device_name() if is_cuda else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": setting.dtype,
            "quantization": options.quantization,
            "packing": options.packing,
            "max_length": size.max_length,
            "micro_batch": size.micro_batch,
            "samples": size.samples,
            "rounds": options.rounds,
            "variants": {name: _summary(name, rounds) for name in VARIANTS},
            "predicted": predicted(setting),
        }
    if options.json:
        json.dump(record, sys.stdout, indent=2)
    else:
        _print(record)


def _summary(name: str, rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    rates = [each[name]["tokens_per_second"] for each in rounds]
    ratios = [
        each[name]["tokens_per_second"] / each["stock"]["tokens_per_second"] for each in rounds
    ]
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "ratio_to_stock": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_gib": statistics.median([each[name]["peak_gib"] for each in rounds]),
    }


def _print(record: Mapping[str, Any]) -> None:
    print(
        f"{record['size']}, {record['device']} ({record['threads']} threads), {record['dtype']}, "
        f"base {record['quantization']}, {record['samples']} samples, micro-batch "
        f"{record['micro_batch']}, {record['rounds']} rounds"
    )
    for name, row in record["variants"].items():
        print(
            f"{name:<8}{row['tokens_per_second']:>10.1f} tokens/s"
            f" [{row['slowest']:.1f}, {row['fastest']:.1f}]"
            f"{row['ratio_to_stock']:>8.2f} x stock"
            f" [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
            f"{row['peak_gib']:>10.2f} GiB peak"
        )
    plan = record["predicted"]
    print(
        f"planner: {plan['tensors_gib']:.2f} GiB of tensors on a GPU, {plan['all_gib']:.2f} GiB "
        "with its allowance"
    )


if __name__ == "__main__":
    main()
