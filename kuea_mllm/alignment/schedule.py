"""The learning-rate schedule of the paper and of the released loop."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_with_warmup(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return the multiplier f(step) / base_lr of open_clip's cosine schedule.

    Args:
        step: Schedule argument s, counted from 0.
        warmup_steps: Length of the linear warm-up; may be 0.
        total_steps: Where the cosine reaches zero.

    Returns:
        A factor in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def lr_multiplier(
    *, warmup_steps: int, total_steps: int, first_update_at_full_lr: bool
) -> Callable[[int], float]:
    """Return the multiplier of update t as a function of t - 1, as `LambdaLR` wants it.

    The released loop sets the rate *after* each update, from a counter that was already
    incremented: update t >= 2 uses f(t - 1) and update 1 the full rate. The usual order uses
    f(t - 1) for every update. They differ in update 1 only.
    """

    def multiplier(completed_updates: int) -> float:
        if completed_updates == 0 and first_update_at_full_lr:
            return 1.0
        return cosine_with_warmup(
            completed_updates, warmup_steps=warmup_steps, total_steps=total_steps
        )

    return multiplier
