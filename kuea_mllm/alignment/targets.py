"""Where the frozen side of the loss comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kuea_mllm.features import Features
from kuea_mllm.objectives import Targets

__all__ = ["FeatureModel", "LiveTargets", "TargetSource", "Targets", "TowerModel"]


class FeatureModel(Protocol):
    """A frozen vision model, as `kuea_mllm.teachers.Teacher` is one."""

    def features(self, pixels01: Tensor, *, patches: bool) -> Features:
        """Embed images (n, 3, size, size) in [0, 1]."""
        ...


class TowerModel(Protocol):
    """A tower that gives the patch tokens of any block, as `towers.model.encode.TowerEncoder`."""

    def features(self, pixels01: Tensor, layer: int | None = None) -> Features:
        """Embed images (n, 3, size, size) in [0, 1]."""
        ...


class TargetSource(Protocol):
    """Anything that gives the targets of a batch: frozen towers, or a cache of what they gave."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Targets:
        """Return the targets of a batch.

        Args:
            batch: On the device: "pixels" (images, 3, size, size) in [0, 1], "index" (images,)
                positions in the listing, and what a caching data set added.
        """
        ...


class LiveTargets:
    """Run the frozen teachers and the frozen original tower on every batch.

    All are kept outside of the trained module, so that no checkpoint and no optimiser sees them.

    Args:
        teachers: Frozen models; the recipe's `teacher` first.
        original: The student as it was before training.
        device: Where they run.
        patch_layer: Hidden state of the original whose patch tokens are wanted, or None.
        teacher_patches: Whether patch tokens of the teachers are wanted.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        original: nn.Module,
        device: torch.device,
        *,
        patch_layer: int | None = None,
        teacher_patches: bool = False,
    ) -> None:
        self.teachers = [model.eval().requires_grad_(False).to(device) for model in teachers]
        self.original = original.eval().requires_grad_(False).to(device)
        self.patch_layer = patch_layer
        self.teacher_patches = teacher_patches

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> Targets:
        """Return the targets of a batch; see `TargetSource`."""
        pixels = batch["pixels"]
        return Targets(
            teachers=self.teacher_features(pixels), original=self.original_features(pixels)
        )

    @torch.no_grad()
    def teacher_features(self, pixels01: Tensor) -> tuple[Features, ...]:
        """Run the teachers only."""
        return tuple(
            model.features(pixels01, patches=self.teacher_patches)  # type: ignore[operator]
            for model in self.teachers
        )

    @torch.no_grad()
    def original_features(self, pixels01: Tensor) -> Features:
        """Run the original tower only."""
        features: Features = self.original.features(pixels01, self.patch_layer)  # type: ignore[operator]
        return features
