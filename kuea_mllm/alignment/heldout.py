"""How far the student is from teacher and original, on images that it never trains on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from kuea_mllm.alignment.targets import TargetSource
from kuea_mllm.diagnostics import embedding_drift
from kuea_mllm.objectives import KernelAlignmentObjective, kernel_gap


class HeldOut:
    """A fixed set of images with its targets; embeds them with the student on demand.

    Args:
        dataset: Items {"pixels", "index"}.
        count: How many images, spread evenly over the listing.
        targets: The same source as in training.
        student: The trained tower; used in eval mode without gradient.
        objective: Its kernels define the gap.
        device: Where the towers are.
        batch_size: Images at once.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        count: int,
        targets: TargetSource,
        student: torch.nn.Module,
        objective: KernelAlignmentObjective,
        device: torch.device,
        batch_size: int,
    ) -> None:
        total = len(dataset)  # type: ignore[arg-type]
        count = min(count, total)
        chosen = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
        # Listings are sorted by class, so a prefix would be one class; spread instead.
        loader = DataLoader(Subset(dataset, sorted(set(chosen))), batch_size=batch_size)
        self._student, self._objective, self._device = student, objective, device
        self._pixels: list[Tensor] = []
        teacher, original = [], []
        for batch in loader:
            pixels = batch["pixels"]
            held = targets(pixels.to(device), batch["index"].to(device))
            self._pixels.append(pixels)
            teacher.append(held.teacher)
            original.append(held.original)
        self.teacher = torch.cat(teacher)  # (images, teacher width)
        self.original = torch.cat(original)  # (images, student width)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.teacher)

    @torch.no_grad()
    def embed(self) -> Tensor:
        """Return the student's present embeddings, (images, width)."""
        was_training = self._student.training
        self._student.eval()
        embedded = torch.cat([self._student(p.to(self._device)) for p in self._pixels])
        self._student.train(was_training)
        return embedded

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the kernel gap and the drift from the original embedding.

        `heldout_kernel_gap_original` is the gap of the untouched tower under the kernel as it is
        now, so that a change of gamma and coef0 alone cannot pass for alignment.
        """
        student = self.embed()
        kernel = self._objective.student_kernel
        target = self._objective.teacher_kernel(self.teacher)
        drift = embedding_drift(student, self.original)
        return {
            "heldout_kernel_gap": kernel_gap(kernel(student), target).item(),
            "heldout_kernel_gap_original": kernel_gap(kernel(self.original), target).item(),
            **{f"heldout_drift_{name}": value for name, value in drift.items()},
        }

    @torch.no_grad()
    def kernel_matrices(self, count: int = 64) -> dict[str, Tensor]:
        """Return the kernel matrices of the first images: original, student now, teacher."""
        kernel = self._objective.student_kernel
        return {
            "original": kernel(self.original[:count]),
            "aligned": kernel(self.embed()[:count]),
            "teacher": self._objective.teacher_kernel(self.teacher[:count]),
        }
