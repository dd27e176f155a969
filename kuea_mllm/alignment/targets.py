"""Where the frozen side of the loss comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Targets:
    """What a batch is compared with; carries no gradient."""

    teacher: Tensor  # (batch, teacher width)
    original: Tensor  # (batch, student width)


class TargetSource(Protocol):
    """Anything that gives the targets of a batch: frozen towers today, a cache of them later."""

    def __call__(self, pixels: Tensor, index: Tensor) -> Targets:
        """Return the targets of a batch.

        Args:
            pixels: (batch, 3, size, size) in [0, 1].
            index: (batch,) positions in the image listing.
        """
        ...


class LiveTargets:
    """Run the frozen teacher and the frozen original tower on every batch.

    Both are kept outside of the trained module, so that no checkpoint and no optimiser sees them.
    """

    def __init__(self, teacher: nn.Module, original: nn.Module, device: torch.device) -> None:
        self.teacher = teacher.eval().requires_grad_(False).to(device)
        self.original = original.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, index: Tensor) -> Targets:
        """Return the targets of a batch; see `TargetSource`."""
        return Targets(teacher=self.teacher(pixels), original=self.original(pixels))
