"""What makes a run faster or smaller without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._triton import has_triton

from kuea_mllm.alignment.targets import LiveTargets
from kuea_mllm.cards import card_of_device
from kuea_mllm.log import LOGGER
from kuea_mllm.towers.model.tower import build_meta_model
from kuea_mllm.towers.spec import TowerSpec


@dataclass(frozen=True)
class Utilisation:
    """What the column `mfu` of the metrics is computed from.

    Attributes:
        flops_per_image: Floating-point operations of one image's update, of all towers that run;
            what is computed twice (micro-batches, gradient checkpointing) counts once.
        peak_flops: What all devices together could do per second.
    """

    flops_per_image: float
    peak_flops: float


def measure_utilisation(
    spec: TowerSpec,
    live: LiveTargets | None,
    *,
    device: torch.device,
    precision: str,
    processes: int,
) -> Utilisation | None:
    """Count the operations of an update, where the peak of the device is known.

    Args:
        spec: The student.
        live: The frozen towers, None where their embeddings come from the cache.
        device: Of this process.
        precision: "fp32" or "bf16".
        processes: Devices of this kind.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    card = card_of_device(name)
    if card is None:
        LOGGER.info("no mfu is logged: the peak rate of %s is not known", name)
        return None
    flops = update_flops(spec, live, device=device)
    LOGGER.info(
        "mfu: %.1f GFLOP for an image, against %s at %.0f TFLOP/s in %s",
        flops / 1e9,
        card.name,
        card.flops_per_second(precision) / 1e12,
        precision,
    )
    return Utilisation(flops, processes * card.flops_per_second(precision))


def update_flops(spec: TowerSpec, live: LiveTargets | None, *, device: torch.device) -> float:
    """Return the operations of one image: student forward and backward, frozen towers forward."""
    from torch.utils.flop_counter import FlopCounterMode

    side = spec.image_size
    student = build_meta_model(spec)
    with FlopCounterMode(display=False) as counter:
        output: Any = student(pixel_values=torch.zeros(1, 3, side, side, device="meta"))
        pooled = output.image_embeds if spec.family == "clip" else output.pooler_output
        pooled.sum().backward()
    total = counter.get_total_flops()
    if live is not None:
        pixels = torch.zeros(1, 3, side, side, device=device)
        with FlopCounterMode(display=False) as frozen:
            live({"pixels": pixels})
        total += frozen.get_total_flops()
    return float(total)


def compile_towers(
    towers: Iterable[nn.Module], choice: Literal["auto", "on", "off"], device: torch.device
) -> bool:
    """Compile towers in place, as the recipe's `runtime.compile` says; log why, or why not.

    In place, so that the names of parameters stay what checkpoints call them.

    Args:
        towers: Modules that are called as such.
        choice: "auto" compiles where it is known to pay.
        device: Where they run.

    Returns:
        Whether they were compiled.
    """
    if choice == "auto":
        if device.type != "cuda":
            is_wanted, reason = False, f"auto: it pays on CUDA, this is {device.type}"
        elif not has_triton():
            is_wanted, reason = False, "auto: triton is missing"
        else:
            is_wanted, reason = True, "auto: CUDA; the first step takes a minute longer"
    else:
        is_wanted, reason = choice == "on", f"runtime.compile={choice}"
    LOGGER.info("towers are %s (%s)", "compiled" if is_wanted else "not compiled", reason)
    if is_wanted:
        for tower in towers:
            tower.compile()
    return is_wanted
