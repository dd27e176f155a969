"""Start-up time and memory of a mixture of conversations, against a Python list of it.

    python benchmarks/mixture.py --records 665298 --workers 2

A synthetic file of the size of LLaVA-1.5's mixture (665,298 records, about 1 GB) is written into a
temporary folder. The list is what the original code keeps: `json.load`, in every process; worker
processes are forked from it, and every record that one reads is copied to it page by page, because
counting references writes. "Own memory" is what the kernel calls private and dirty: pages that
belong to one process alone and cannot be dropped. Each part runs in a fresh process; the file lies
in the page cache. The last part prepares samples in one process on one core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TEXT_SHARE = 40_688 / 665_298
MEBI = 2**20
_WORDS = 20_000


def synthetic_records(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield records that resemble the mixture's in size: about five rounds, 1.5 KB."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfw"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(_WORDS)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    for number in range(count):
        has_image = rng.random() >= TEXT_SHARE
        turns = []
        for turn in range(rng.randint(1, 9)):
            tag = "<image>\n" if has_image and turn == 0 else ""
            turns.append({"from": "human", "value": f"{tag}{text(10, 22)}?"})
            turns.append({"from": "gpt", "value": text(1, 36)})
        record: dict[str, Any] = {"id": f"{number:012d}"}
        if has_image:
            record["image"] = f"coco/train2017/{number:012d}.jpg"
        yield {**record, "conversations": turns}


def write_synthetic(path: Path, count: int) -> None:
    """Write a JSON list on one line, as the mixture is."""
    with path.open("w", encoding="utf-8") as file:
        separator = "["
        for record in synthetic_records(count):
            file.write(separator + json.dumps(record))
            separator = ", "
        file.write("]")


def own_memory() -> float:
    """Return the private, dirty MiB of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not report private memory (Linux is needed)")


def highest_memory() -> float:
    """Return the largest resident set of this process so far, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_workers(read: Callable[[int], Any], count: int, workers: int) -> list[dict[str, float]]:
    """Fork workers that each read their share of all positions in random order."""
    order = list(range(count))
    random.Random(1).shuffle(order)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    together = context.Barrier(workers)

    def work(number: int) -> None:
        before = own_memory()
        share = order[number::workers]
        started = time.perf_counter()
        words = 0
        for position in share:
            words += sum(len(turn["value"]) for turn in read(position)["conversations"])
        seconds = time.perf_counter() - started
        together.wait()
        queue.put(
            {
                "own_mib": own_memory() - before,
                "records_per_second": len(share) / seconds,
                "characters": words,
            }
        )

    processes = [context.Process(target=work, args=(number,)) for number in range(workers)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def part_list(path: Path, workers: int) -> dict[str, Any]:
    """Measure the list."""
    before = own_memory()
    started, started_cpu = time.perf_counter(), time.process_time()
    with path.open(encoding="utf-8") as file:
        records = json.load(file)
    # The original's `modality_lengths`, which its sampler needs before the first step.
    lengths = [sum(len(t["value"].split()) for t in each["conversations"]) for each in records]
    figures = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - started_cpu,
        "own_mib": own_memory() - before,
        "peak_mib": highest_memory(),
    }
    read = in_workers(records.__getitem__, len(lengths), workers)
    return {**figures, "workers": read}


def part_arrow(path: Path, workers: int) -> dict[str, Any]:
    """Measure the Arrow file; made now or before."""
    from kuea_mllm.tuning.mixture import open_mixture

    # After the imports, which a training has anyway.
    before = own_memory()
    started, started_cpu = time.perf_counter(), time.process_time()
    mixture = open_mixture(path, cache=path.parent / "cache", progress=False)
    lengths = mixture.lengths()
    figures = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - started_cpu,
        "own_mib": own_memory() - before,
        "peak_mib": highest_memory(),
    }
    return {**figures, "workers": in_workers(mixture.record, len(lengths), workers)}


def part_samples(path: Path, tokenizer: str, count: int) -> dict[str, Any]:
    """Measure what is done to one sample, on one core."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoTokenizer

    from kuea_mllm.adapters.llava.images import PaddedImages
    from kuea_mllm.adapters.llava.tuning import LlavaConversations
    from kuea_mllm.tuning.collate import Collator
    from kuea_mllm.tuning.examples import Example, TuningExamples
    from kuea_mllm.tuning.mixture import open_mixture

    torch.set_num_threads(1)
    mixture = open_mixture(path, cache=path.parent / "cache", progress=False)
    encoder = LlavaConversations(AutoTokenizer.from_pretrained(tokenizer), max_length=2048)
    collate = Collator(
        placeholder=encoder.placeholder,
        image_token_id=len(encoder.tokenizer),
        tokens_per_image=576,
        pad_token_id=encoder.pad_token_id,
        max_length=2048,
    )
    positions = range(min(count, len(mixture)))
    started = time.process_time()
    encoded = [encoder.encode(mixture.record(position)) for position in positions]
    encoding = time.process_time() - started
    pixels = torch.zeros(3, 336, 336)
    examples = [
        Example(n, each.input_ids, each.labels, pixels, each.left_out)
        for n, each in enumerate(encoded)
    ]
    started = time.process_time()
    for start in range(0, len(examples), 16):
        collate(examples[start : start + 16])
    collating = time.process_time() - started
    image = path.parent / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(image, quality=90)
    whole = TuningExamples(
        mixture,
        encoder,
        images=path.parent,
        preprocess=PaddedImages(336, [0.5] * 3, [0.25] * 3),
    )
    for position in positions:
        name = mixture.record(position)["image"]
        if name is not None:
            link = path.parent / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image)
    started = time.process_time()
    for start in range(0, len(positions), 16):
        collate([whole[position] for position in positions[start : start + 16]])
    together = time.process_time() - started
    number = len(positions)
    return {
        "samples": number,
        "tokens_per_sample": sum(len(each.input_ids) for each in encoded) / number,
        "encoded_per_second": number / encoding,
        "collated_per_second": number / collating,
        "with_image_per_second": number / together,
    }


def run_part(part: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a fresh process."""
    command = [sys.executable, __file__, f"--part={part}", f"--path={path}"]
    command += [f"--workers={options.workers}", f"--samples={options.samples}"]
    command += [f"--tokenizer={options.tokenizer}"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> None:
    """Measure all parts, print a table and write JSON if asked."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "mix.json"
        write_synthetic(path, options.records)
        size = path.stat().st_size
        print(f"{options.records} records, {size / MEBI:.0f} MiB, {os.cpu_count()} cores")
        parts = {
            "list": run_part("list", path, options),
            "Arrow, first time": run_part("arrow", path, options),
            "Arrow, afterwards": run_part("arrow", path, options),
        }
        samples = run_part("samples", path, options)
    print(
        f"{'':<18} {'ready after':>12} {'CPU':>7} {'own, main':>11} {'peak, main':>11} "
        f"{'own, each worker':>17} {'read/s, worker':>15}"
    )
    for name, figures in parts.items():
        workers = figures["workers"]
        own = sum(each["own_mib"] for each in workers) / len(workers)
        rate = sum(each["records_per_second"] for each in workers) / len(workers)
        print(
            f"{name:<18} {figures['seconds']:>10.1f} s {figures['cpu_seconds']:>5.1f} s "
            f"{figures['own_mib']:>7.0f} MiB "
            f"{figures['peak_mib']:>7.0f} MiB {own:>13.0f} MiB {rate:>15.0f}"
        )
    print(
        f"\none core, {samples['tokens_per_sample']:.0f} tokens a sample: "
        f"{samples['encoded_per_second']:.0f} samples/s encoded, "
        f"{samples['collated_per_second']:.0f} collated (16 at a time), "
        f"{samples['with_image_per_second']:.0f} with a 640 x 480 JPEG for 336 pixels"
    )
    if options.json:
        record = {
            "records": options.records,
            "bytes": size,
            "workers": options.workers,
            "parts": parts,
            "samples": samples,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("pyarrow", "torch", "transformers", "tokenizers")
            },
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line."""
    from kuea_mllm.miniworld import ASSETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=665_298)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument(
        "--tokenizer",
        default=str(ASSETS / "llava"),
        help="By default the mini world's, which splits most words into letters.",
    )
    parser.add_argument("--folder", type=Path, help="Where to put 3 GB for a while.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None:
        compare(options)
    elif options.part == "samples":
        print(json.dumps(part_samples(options.path, options.tokenizer, options.samples)))
    else:
        part = part_list if options.part == "list" else part_arrow
        print(json.dumps(part(options.path, options.workers)))


if __name__ == "__main__":
    main()
