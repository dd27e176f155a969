"""Time and memory of putting a tower into LLaVA-1.5-7B: transformers against `kuea-mllm swap`.

python benchmarks/swap.py --work FOLDER                  # 7B: 32 GB of disk, 16 GB of memory
python benchmarks/swap.py --work FOLDER --size tiny      # to try it

The base has the sizes, key names, dtype (float16) and three shards with index of
llava-hf/llava-1.5-7b-hf, and random weights; the tower is CLIP ViT-L-14-336 in float32, the base's
own with a little noise, as an alignment leaves it. Each run is a process of its own, measured from
start to exit, imports (of compiled modules) included:

transformers  load the model, load the tower into it, save it (and copy tokenizer and processor);
link          `kuea-mllm swap` as it is: hard links for shards that hold no tower weights, both
              towers run on two probe images;
no drift      the same without running the towers (`--no-drift`);
copy          without links, as across file systems (`--copy`);
own shard     into a base that was prepared once with `--own-shard` (the preparation is shown, and
              not part of the time), without running the towers.

Peak memory is that of the kernel (`VmHWM`), which counts pages of mapped files; the share that is
not backed by files is sampled and given as well. "On disk" is the time that it then takes until
everything has left the page cache. All results are checked to hold the same tower.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

_FICLONE = 0x40049409
_TEXT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_VISION_KEYS = (*_TEXT_KEYS, "image_size", "patch_size", "projection_dim")


@dataclass(frozen=True)
class Size:
    """One base: its language model, its tower, its shards."""

    text: dict[str, int]
    vision: dict[str, int]
    shard_bytes: int


SIZES = {
    "7b": Size(
        dict(zip(_TEXT_KEYS, (4096, 11008, 32, 32), strict=True)) | {"vocab_size": 32064},
        dict(zip(_VISION_KEYS, (1024, 4096, 24, 16, 336, 14, 768), strict=True)),
        5_000_000_000,
    ),
    "tiny": Size(
        dict(zip(_TEXT_KEYS, (256, 704, 8, 8), strict=True)) | {"vocab_size": 32064},
        dict(zip(_VISION_KEYS, (128, 512, 4, 4, 56, 14, 64), strict=True)),
        17_000_000,
    ),
}

# What the runs execute, so that nothing of the measuring process is counted.
_TRANSFORMERS = """
import shutil, sys
from pathlib import Path
import torch
from transformers import CLIPVisionModel, LlavaForConditionalGeneration
base, tower, out = map(Path, sys.argv[1:4])
model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float16)
new = CLIPVisionModel.from_pretrained(tower, dtype=torch.float16)
model.model.vision_tower.load_state_dict(new.state_dict())
model.save_pretrained(out, max_shard_size=sys.argv[4])
for file in base.iterdir():
    if "tokenizer" in file.name or "processor" in file.name:
        shutil.copyfile(file, out / file.name)
"""
_OURS = "from kuea_mllm.cli.main import run; run()"
_FINGERPRINT = """
import sys
from pathlib import Path
from kuea_mllm.adapters.registry import get_adapter
from kuea_mllm.swapping import tower_fingerprint_of
print(tower_fingerprint_of(Path(sys.argv[1]), get_adapter("llava")))
"""


@dataclass(frozen=True)
class Run:
    """What one run took."""

    seconds: float
    cpu_seconds: float
    seconds_until_on_disk: float
    peak_gb: float
    peak_anonymous_gb: float


def write_world(work: Path, size: Size) -> tuple[Path, Path]:
    """Write base and tower; return their directories."""
    base, tower = work / "base", work / "tower"
    if not (base.is_dir() and tower.is_dir()):
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(tower, ignore_errors=True)
        write_base(base, size)
        write_tower(tower, base, size)
    return base, tower


def write_base(base: Path, size: Size) -> None:
    """Write a LLaVA-1.5 directory, one tensor in memory at a time."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from kuea_mllm.miniworld import ASSETS

    base.mkdir(parents=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision, hidden_act="quick_gelu"),
        text_config=LlamaConfig(**size.text, rms_norm_eps=1e-5, max_position_embeddings=4096),
        image_token_index=32000,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float16"
    config.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "llava" / name, base / name)
    for name in ("preprocessor_config.json", "processor_config.json"):
        text = (ASSETS / "llava" / name).read_text()
        text = text.replace(": 32", f": {size.vision['image_size']}")
        text = text.replace('"patch_size": 8', f'"patch_size": {size.vision["patch_size"]}')
        (base / name).write_text(text)
    shards = split(released_shapes(config), size.shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(base / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(2 * int(np.prod(shape)) for shard in shards for shape in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def released_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor under the names of the release, in the model's order."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    renamed = (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    )
    shapes = {}
    for name, tensor in model.state_dict().items():
        old, new = next(pair for pair in renamed if name.startswith(pair[0]))
        shapes[new + name.removeprefix(old)] = tuple(tensor.shape)
    return shapes


def split(shapes: dict[str, tuple[int, ...]], most: int) -> list[dict[str, tuple[int, ...]]]:
    """Fill shards in order, as `save_pretrained` does: the tower is in the first."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        length = 2 * int(np.prod(shape))
        if filled + length > most:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += length
    return shards


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write one safetensors file of float16 values, a block at a time."""
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(np.float16)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The library sorts by name, too, where all tensors have one dtype.
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (name, shape) in enumerate(sorted(shapes.items())):
            left = int(np.prod(shape))
            if "norm" in name and name.endswith("weight"):
                file.write(np.ones(left, np.float16).data)
                continue
            # Another part of the block for every tensor.
            start = number * 7919 % (block.size // 2)
            while left:
                part = block[start : start + left]
                file.write(part.data)
                left, start = left - part.size, 0


def write_tower(tower: Path, base: Path, size: Size) -> None:
    """Write the base's own tower with a little noise, in float32, as a Hugging Face directory."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig

    tower.mkdir()
    config = CLIPVisionConfig(**size.vision, hidden_act="quick_gelu")
    config.architectures = ["CLIPVisionModelWithProjection"]
    config.save_pretrained(tower)
    shutil.copyfile(base / "preprocessor_config.json", tower / "preprocessor_config.json")
    numbers = torch.Generator().manual_seed(0)
    state = {}
    for shard in sorted(base.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if name.startswith("vision_tower."):
                value = tensor.float()
                noise = torch.randn(value.shape, generator=numbers) * value.std(correction=0) * 0.01
                state[name.removeprefix("vision_tower.")] = value + noise
    width, out = size.vision["hidden_size"], size.vision["projection_dim"]
    state["visual_projection.weight"] = torch.randn(out, width, generator=numbers) * width**-0.5
    save_file(state, tower / "model.safetensors", metadata={"format": "pt"})


def measure(command: list[str], out: Path, environment: dict[str, str]) -> Run:
    """Run a command to its end and look at what it needed."""
    log = out.with_name("log.txt")
    with log.open("wb") as said:
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        # Not `ru_maxrss`: it begins with what this process held when it started the other.
        peaks = {"VmHWM": 0.0, "RssAnon": 0.0}
        sampler = threading.Thread(target=_sample, args=(child.pid, peaks), daemon=True)
        sampler.start()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    sampler.join()
    started = time.monotonic()
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    on_disk = seconds + time.monotonic() - started
    cpu = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu, on_disk, peaks["VmHWM"], peaks["RssAnon"])


def _sample(pid: int, peaks: dict[str, float]) -> None:
    status = Path(f"/proc/{pid}/status")
    while True:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        found = {name: value for name, _, value in (line.partition(":") for line in lines)}
        if "RssAnon" not in found:
            return
        for name, highest in peaks.items():
            peaks[name] = max(highest, int(found[name].split()[0]) * 1024 / 1e9)
        time.sleep(0.02)


def commands(base: Path, tower: Path, out: Path, size: Size) -> Iterator[Any]:
    """Yield the name and the command of every variant."""
    python = sys.executable
    given = [f"--tower={tower}", f"--out={out}"]
    ours = [python, "-c", _OURS, "swap", f"--base={base}", *given]
    own = [python, "-c", _OURS, "swap", f"--base={own_shard_of(base)}", *given]
    parts = [str(base), str(tower), str(out), f"{size.shard_bytes // 1_000_000}MB"]
    yield "transformers", [python, "-c", _TRANSFORMERS, *parts]
    yield "link", ours
    yield "no drift", [*ours, "--no-drift"]
    yield "copy", [*ours, "--copy"]
    yield "own shard", [*own, "--no-drift"]


def own_shard_of(base: Path) -> Path:
    """Return where the base with its tower in a file of its own is kept."""
    return base.with_name(f"{base.name}-own-shard")


def prepare(base: Path, environment: dict[str, str]) -> Run:
    """Write the base with its tower in a file of its own."""
    out = own_shard_of(base)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", _OURS, "swap", f"--base={base}", f"--tower={base}"]
    return measure(
        [*command, f"--out={out}", "--own-shard", "--allow-same", "--no-drift"], out, environment
    )


def warm_up(work: Path) -> dict[str, str]:
    """Run every command on a tiny model, so that modules are compiled; return the environment."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(work / "modules")
    tiny = work / "tiny"
    base, tower = write_world(tiny, SIZES["tiny"])
    prepare(base, environment)
    for _, command in commands(base, tower, tiny / "out", SIZES["tiny"]):
        measure(command, tiny / "out", environment)
        shutil.rmtree(tiny / "out")
    return environment


def set_cache(directories: list[Path], state: str) -> None:
    """Bring the files that will be read into the page cache, or drop them from it."""
    os.sync()
    for path in (path for directory in directories for path in directory.iterdir()):
        with path.open("rb") as file:
            if state == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 26):
                    pass


def describe_place(work: Path) -> dict[str, Any]:
    """Say what the files lie on, and whether it clones files without copying their content."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    place = str(work.resolve())
    above = [m for m in mounts if place == m[1] or place.startswith(m[1].rstrip("/") + "/")]
    one, two = work / "clone-one", work / "clone-two"
    one.write_bytes(b"x" * 4096)
    with one.open("rb") as source, two.open("wb") as target:
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
            clones = True
        except OSError:
            clones = False
    one.unlink()
    two.unlink()
    return {"file_system": max(above, key=lambda m: len(m[1]))[2], "clones_files": clones}


def print_table(runs: dict[str, list[Run]]) -> None:
    """Print medians, extremes and the ratios to transformers."""
    reference = statistics.median(run.seconds for run in runs["transformers"])
    titles = f"{'ratio':>7}{'CPU s':>7}{'on disk':>9}{'peak GB':>9}{'anon GB':>9}"
    print(f"{'variant':<14}{'seconds':>20}{titles}")
    for name, each in runs.items():
        seconds = [run.seconds for run in each]
        middle = statistics.median(seconds)
        spread = f"{middle:.1f} ({min(seconds):.1f}-{max(seconds):.1f})"
        cpu = statistics.median(run.cpu_seconds for run in each)
        on_disk = statistics.median(run.seconds_until_on_disk for run in each)
        peak = max(run.peak_gb for run in each)
        anonymous = max(run.peak_anonymous_gb for run in each)
        print(
            f"{name:<14}{spread:>20}{reference / middle:>7.1f}{cpu:>7.1f}"
            f"{on_disk:>9.1f}{peak:>9.2f}{anonymous:>9.2f}"
        )


def main() -> None:
    """Write the models, run all variants in turn, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="Folder for the models.")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--repeats", type=int, default=3, help="Of our variants.")
    parser.add_argument("--transformers-repeats", type=int, default=1)
    parser.add_argument("--cache", choices=["cold", "warm"], default="cold", help="Page cache.")
    parser.add_argument("--keep", action="store_true", help="Keep the models for another time.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    options = parser.parse_args()
    size, work = SIZES[options.size], options.work
    work.mkdir(parents=True, exist_ok=True)
    environment = warm_up(work)
    base, tower = write_world(work, size)
    print("preparation of own shard", asdict(prepare(base, environment)), flush=True)
    out = work / "out"
    runs: dict[str, list[Run]] = {}
    fingerprints: set[str] = set()
    for repeat in range(max(options.repeats, options.transformers_repeats)):
        for name, command in commands(base, tower, out, size):
            limit = options.transformers_repeats if name == "transformers" else options.repeats
            if repeat >= limit:
                continue
            shutil.rmtree(out, ignore_errors=True)
            set_cache([base, own_shard_of(base), tower], options.cache)
            runs.setdefault(name, []).append(measure(command, out, environment))
            found = subprocess.run(
                [sys.executable, "-c", _FINGERPRINT, out],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            fingerprints.add(found.stdout.strip())
            print(name, asdict(runs[name][-1]), flush=True)
    shutil.rmtree(out)
    if len(fingerprints) != 1:
        raise SystemExit("the variants did not write the same tower")
    print_table(runs)
    if options.json:
        bytes_of_base = sum(path.stat().st_size for path in base.iterdir())
        record = {
            "size": options.size,
            "base_gb": bytes_of_base / 1e9,
            "page_cache": options.cache,
            **describe_place(work),
            "runs": {name: [asdict(run) for run in each] for name, each in runs.items()},
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "python": sys.version.split()[0],
            "machine": platform.machine(),
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not options.keep:
        for directory in (base, own_shard_of(base), tower, work / "tiny", work / "modules"):
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
