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
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lora_parts.models import SIZES, write_base
from lora_parts.ours import ours
from lora_parts.padding import padding_table
from lora_parts.samples import Samples
from lora_parts.setting import Setting
from lora_parts.stock import stock

from kuea_mllm.cards import card_or_device, find_card
from kuea_mllm.planning.tuning import plan_tuning

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


def predicted(setting: Setting) -> dict[str, float]:
    """Return what the planner says of our variant on a GPU, without its allowance for CUDA."""
    card = find_card("rtx4090")
    if setting.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        card = card_or_device(properties.name, properties.total_memory)
    plan = plan_tuning(setting.recipe(), base=setting.base, card=card)
    parts = [part.bytes for part in plan.memory if part.name != "allowance"]
    return {"all_gib": plan.memory_gib, "tensors_gib": sum(parts) / 2**30}


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
