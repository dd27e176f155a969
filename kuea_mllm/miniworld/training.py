"""What the three trainings share: pixels, the optimiser's schedule and the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; AdamW, linear warm-up, then a cosine to zero."""

    steps: int
    lr: float
    warmup_steps: int = 50
    weight_decay: float = 0.05


def in_eval_mode(model: _Model) -> _Model:
    """Switch a model to evaluation and return it."""
    # The `eval` of transformers models has no types.
    model.train(False)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Seed torch inside the block and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def normalise_pixels(
    images: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Turn uint8 (n, 32, 32, 3) into normalised float32 (n, 3, 32, 32).

    Equal to what the saved image processors make of the same pictures: those resize and crop to
    the size the pictures already have.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def optimise(
    modules: Sequence[nn.Module],
    compute_loss: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    label: str,
    progress: bool,
) -> list[float]:
    """Run a training loop.

    Args:
        modules: Modules whose trainable parameters are optimised.
        compute_loss: Gives the loss of a step, from 0.
        schedule: Steps, learning rate and their like.
        label: Name on the progress bar.
        progress: Whether to show the bar.

    Returns:
        The loss of every step.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.98))
    losses = []
    bar = tqdm(range(schedule.steps), desc=label, disable=not progress, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * _rate(step, schedule)
        loss = compute_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def _rate(step: int, schedule: Schedule) -> float:
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
