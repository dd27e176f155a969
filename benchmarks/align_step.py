"""Speed of one update: the released step against ours, live and with cached targets.

python benchmarks/align_step.py --size tiny --device cpu
python benchmarks/align_step.py --size vit_b_16 --device cpu --batch 8 --steps 3
python benchmarks/align_step.py --size vit_l_14 --device cuda        # and vit_l_14_336

All variants run in one process, in turn, several times; what is compared is the ratio to variant
(a). Weights and images are random, and images are in memory: decoding has a benchmark of its own
(data_path.py).

(a) released: what the authors' loop does, restated: three fp32 forward passes (student, original,
    teacher), the loss over the whole batch, AdamW without fusion, the values of every term fetched
    from the device in every step. On one device DataParallel is a plain call.
(b) live: our trainer, frozen towers run in every step.
(c) cached: our trainer, teacher and original embeddings read from memory.
(d) bare: the same step as (c) in a plain loop, to see what `transformers.Trainer` costs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2WithRegistersConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kuea_mllm.alignment.speed import compile_towers
from kuea_mllm.alignment.step import WholeBatchStep
from kuea_mllm.alignment.targets import LiveTargets, Targets
from kuea_mllm.alignment.trainer import AlignmentModel, AlignmentTrainer
from kuea_mllm.config.align import OptimConfig, RuntimeConfig
from kuea_mllm.data.transforms import unit_pixels
from kuea_mllm.features import Features
from kuea_mllm.kernels import PolynomialKernel
from kuea_mllm.objectives import KernelTerm, Objective, PreservationTerm


@dataclass(frozen=True)
class Size:
    """Student, teacher and batch of one setting."""

    student: dict[str, int]
    teacher: dict[str, int]
    batch: int
    teacher_image_size: int


_DINOV2_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_DINOV2_L |= {"patch_size": 14, "image_size": 518}


def _clip(size: int, patch: int, width: int, layers: int, out: int) -> dict[str, int]:
    return {
        "image_size": size,
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "projection_dim": out,
    }


SIZES = {
    "tiny": Size(
        _clip(32, 8, 64, 3, 64),
        {
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "patch_size": 8,
            "image_size": 32,
        },
        batch=128,
        teacher_image_size=32,
    ),
    "vit_b_16": Size(_clip(224, 16, 768, 12, 512), _DINOV2_L, 128, 224),
    "vit_l_14": Size(_clip(224, 14, 1024, 24, 768), _DINOV2_L, 64, 224),
    "vit_l_14_336": Size(_clip(336, 14, 1024, 24, 768), _DINOV2_L, 32, 224),
}


class Student(nn.Module):
    """A CLIP tower on pixels in [0, 1]."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.model = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**config, hidden_act="quick_gelu", attn_implementation="sdpa")
        )

    def features(self, pixels: Tensor, layer: int | None = None) -> Features:
        """Return the projected embeddings."""
        return Features(self.model(pixel_values=(pixels - 0.45) / 0.27).image_embeds)


class Teacher(nn.Module):
    """A DINOv2 with registers on pixels in [0, 1]."""

    def __init__(self, config: dict[str, int], size: int) -> None:
        super().__init__()
        from transformers import Dinov2WithRegistersModel

        self.model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**config, attn_implementation="sdpa")
        )
        self.size = size

    def features(self, pixels: Tensor, *, patches: bool = False) -> Features:
        """Return the class token."""
        if pixels.shape[-1] != self.size:
            pixels = nn.functional.interpolate(
                pixels, size=(self.size, self.size), mode="bicubic", antialias=True
            )
        output: BaseModelOutput = self.model(pixel_values=(pixels - 0.45) / 0.23)
        return Features(output.last_hidden_state[:, 0])


class Pictures(Dataset[dict[str, Any]]):
    """Random images in memory, with or without target rows."""

    def __init__(self, count: int, size: int, rows: Mapping[str, Tensor] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(
            256, (count, 3, size, size), dtype=torch.uint8, generator=generator
        )
        self.rows = rows or {}

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        index = draw % len(self.pixels)
        rows = {name: values[index] for name, values in self.rows.items()}
        return {"pixels": self.pixels[index], "index": index, **rows}


class RowTargets:
    """Targets that came with the batch."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Targets:
        """Return them."""
        return Targets((Features(batch["teacher_0"]),), Features(batch["original"]))


@dataclass
class Setting:
    """Everything that the variants share."""

    student: Student
    original: Student
    teacher: Teacher
    size: Size
    device: torch.device
    batch: int
    steps: int
    precision: str
    rows: dict[str, Tensor]

    def model(self) -> AlignmentModel:
        """Return a fresh student with its objective."""
        kernel = PolynomialKernel(0.0032, 0.191623, trainable=True)
        width = self.teacher.model.config.hidden_size
        objective = Objective(
            [
                KernelTerm(kernel, PolynomialKernel(1 / width, 1.0), weight=0.5),
                PreservationTerm(weight=1.0),
            ]
        )
        return AlignmentModel(copy.deepcopy(self.student), objective).to(self.device)

    def pictures(self, *, with_rows: bool = False) -> Pictures:
        """Return the images."""
        count = 2 * self.batch
        return Pictures(count, self.size.student["image_size"], self.rows if with_rows else None)


def released(setting: Setting) -> float:
    """Variant (a): seconds for one step."""
    model = setting.model()
    kernel_term, _ = model.objective.pooled_terms
    optimizer = torch.optim.AdamW(
        [
            {"params": model.student.parameters(), "weight_decay": 1e-4},
            {"params": model.objective.parameters(), "weight_decay": 0.0},
        ],
        lr=1e-5,
    )
    loader = _forever(DataLoader(setting.pictures(), batch_size=setting.batch, shuffle=True))

    def step() -> None:
        pixels = unit_pixels(next(loader)["pixels"].to(setting.device))
        embedding = model.student.features(pixels).pooled
        with torch.no_grad():
            original = setting.original.features(pixels).pooled
            teacher = setting.teacher.features(pixels).pooled
        clean = (embedding - original).square().sum(1).mean()
        gap = kernel_term(embedding, Targets((Features(teacher),), Features(original)))
        loss = clean + 0.5 * gap
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for value in (clean, gap, loss):
            value.item()

    return _time(step, setting)


def bare(setting: Setting) -> float:
    """Variant (d): our step in a plain loop, cached targets."""
    model = setting.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=setting.device.type == "cuda")
    run = WholeBatchStep(
        model.objective,
        RowTargets(),
        autocast=lambda: torch.autocast(
            setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16"
        ),
        backward=lambda loss: loss.backward(),
        no_sync=lambda _: nullcontext(),
    )
    pictures = setting.pictures(with_rows=True)
    loader = _forever(DataLoader(pictures, batch_size=setting.batch, shuffle=True))

    def step() -> None:
        batch = {name: value.to(setting.device) for name, value in next(loader).items()}
        run(model, {**batch, "pixels": unit_pixels(batch["pixels"])})
        optimizer.step()
        optimizer.zero_grad()

    return _time(step, setting)


def ours(setting: Setting, *, cached: bool) -> float:
    """Variants (b) and (c): seconds for one step of the trainer."""
    targets: Any = RowTargets()
    if not cached:
        targets = LiveTargets([setting.teacher], setting.original, setting.device)
    warmup = 2
    model = setting.model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Timed(
            model,
            targets,
            setting.pictures(with_rows=cached),
            optim=OptimConfig(
                batch_size=setting.batch,
                steps=setting.steps + warmup,
                first_update_at_full_lr=False,
            ),
            runtime=RuntimeConfig(
                device=setting.device.type,
                precision=setting.precision,  # type: ignore[arg-type]
                log_every=10_000,
            ),
            output_dir=Path(folder),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.warmup = warmup
        # As `align` does; on the CPU it compiles nothing. The bare loop (d) stays uncompiled there.
        frozen = [] if cached else [setting.teacher.model, setting.original.model]
        compile_towers([model.student.model, *frozen], "auto", setting.device)
        trainer.train()
        return trainer.seconds / setting.steps


class _Timed(AlignmentTrainer):
    """Starts its clock after the first steps."""

    warmup = 0
    started = 0.0
    seconds = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == self.warmup:
            _synchronise(self.args.device)
            self.started = time.perf_counter()
        return super().training_step(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        _synchronise(self.args.device)
        self.seconds = time.perf_counter() - self.started
        return super()._finalize_training(*args, **kwargs)


def _time(step: Callable[[], None], setting: Setting) -> float:
    for _ in range(2):
        step()
    _synchronise(setting.device)
    started = time.perf_counter()
    for _ in range(setting.steps):
        step()
    _synchronise(setting.device)
    return (time.perf_counter() - started) / setting.steps


def _forever(loader: DataLoader[Any]) -> Any:
    while True:
        yield from loader


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def prepare(options: argparse.Namespace) -> Setting:
    """Build models and images."""
    torch.manual_seed(0)
    size = SIZES[options.size]
    device = torch.device(options.device)
    student = Student(size.student)
    teacher = Teacher(size.teacher, size.teacher_image_size).eval().requires_grad_(False)
    setting = Setting(
        student=student,
        original=copy.deepcopy(student).eval().requires_grad_(False).to(device),
        teacher=teacher.to(device),
        size=size,
        device=device,
        batch=options.batch or size.batch,
        steps=options.steps,
        precision=options.precision or ("bf16" if device.type == "cuda" else "fp32"),
        rows={},
    )
    count = 2 * setting.batch
    # Values do not matter for speed, their sizes do.
    setting.rows = {
        "teacher_0": torch.randn(count, size.teacher["hidden_size"]),
        "original": torch.randn(count, size.student["projection_dim"]),
    }
    return setting


def model_flops(setting: Setting) -> float:
    """Return the operations of student forward and backward for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        student = Student(setting.size.student)
        side = setting.size.student["image_size"]
        with FlopCounterMode(display=False) as counter:
            student.features(torch.zeros(1, 3, side, side)).pooled.sum().backward()
    return float(counter.get_total_flops())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="default: the paper's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the MFU")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    setting = prepare(options)
    variants: dict[str, Callable[[], float]] = {
        "(a) released": lambda: released(setting),
        "(b) ours, live": lambda: ours(setting, cached=False),
        "(c) ours, cached": lambda: ours(setting, cached=True),
        "(d) bare loop, cached": lambda: bare(setting),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    memory: dict[str, float] = {}
    for _ in range(options.repeats):
        for name, run in variants.items():
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(run())
            if setting.device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
    flops = model_flops(setting)
    rows = []
    baseline = seconds["(a) released"]
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(baseline, values, strict=True)]
        rate = setting.batch / statistics.median(values)
        row = {
            "variant": name,
            "images_per_second": rate,
            "ratio_to_released": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        if name in memory:
            row["peak_gib"] = memory[name]
        if options.peak_tflops:
            row["mfu"] = rate * flops / (options.peak_tflops * 1e12)
        rows.append(row)
    overhead = statistics.median(
        c / d - 1
        for c, d in zip(seconds["(c) ours, cached"], seconds["(d) bare loop, cached"], strict=True)
    )
    record = {
        "size": options.size,
        "batch": setting.batch,
        "device": torch.cuda.get_device_name() if setting.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": setting.precision,
        "steps": options.steps,
        "repeats": options.repeats,
        "variants": rows,
        "trainer_overhead": overhead,
    }
    if options.json:
        json.dump(record, sys.stdout, indent=2)
        return
    print(f"{options.size}, batch {setting.batch}, {record['device']}, {setting.precision}")
    for row in rows:
        more = "".join(f"  {key} {row[key]:.2f}" for key in ("peak_gib", "mfu") if key in row)
        print(
            f"{row['variant']:<24}{row['images_per_second']:>10.1f} images/s"
            f"{row['ratio_to_released']:>8.2f} x (a)"
            f"  [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]{more}"
        )
    print(f"transformers.Trainer against the bare loop, same step: {100 * overhead:+.1f} %")


if __name__ == "__main__":
    main()
