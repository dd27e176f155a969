"""How far the student is from teacher and original, on images that it never trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from kuea_mllm.alignment.targets import TargetSource
from kuea_mllm.data.transforms import unit_pixels
from kuea_mllm.diagnostics import (
    TokenDrift,
    embedding_drift,
    linear_cka,
    relative_token_drift,
)
from kuea_mllm.features import Features
from kuea_mllm.kernels import Kernel
from kuea_mllm.objectives import kernel_gap, widened

# Cached embeddings may be stored in half precision; an untouched student differs by no more.
_ROUNDING = 0.02


class HeldOut:
    """A fixed set of images with its targets; embeds them with the student on demand.

    Images stay on the host as uint8 (256 of 336 pixels: 87 MB) and targets as pooled embeddings.
    Patch tokens of the original are many (256 images of ViT-L-14-336: 600 MB in fp32), so they are
    recomputed with the frozen original at each measurement, a batch at a time, which is exact; an
    original that was moved off the device to save memory comes back for that long. Only where there
    is no frozen original at all (`targets.original` is missing or None) are they kept on the host,
    in half precision.

    Args:
        dataset: Items {"pixels", "index", ...}, without random transform; uint8 pixels, or floats
            in [0, 1].
        positions: Which items are held out.
        targets: The same source as in training; called once for each batch, here.
        student: The trained tower; used in eval mode without gradient. With a `patch_layer` it must
            still be the original one if `targets` has no frozen original: build this before a
            checkpoint is loaded.
        gauge: Kernels of student and teacher that define the gap.
        device: Where the towers are.
        batch_size: Images at once.
        patch_layer: Hidden state whose patch tokens are compared; None leaves them out.
        precision: The same as in training, so that rounding is not taken for drift.

    Raises:
        ValueError: If fewer than two images are held out, or if the original's patch tokens are
            asked for and the student has moved already.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        positions: NDArray[Any],
        *,
        targets: TargetSource,
        student: torch.nn.Module,
        gauge: tuple[Kernel, Kernel],
        device: torch.device,
        batch_size: int,
        patch_layer: int | None,
        precision: Literal["fp32", "bf16"],
    ) -> None:
        if len(positions) < 2:
            raise ValueError(f"two held-out images are needed at least, not {len(positions)}")
        self._student, self._device, self._precision = student, device, precision
        self._student_kernel, self._teacher_kernel = gauge
        self._patch_layer = patch_layer
        self._original: Any = getattr(targets, "original", None)
        self._pixels: list[Tensor] = []
        self._tokens: list[Tensor] = []  # of the original, only where it cannot be run again
        teacher, original = [], []
        chosen = Subset(dataset, [int(position) for position in positions])
        for batch in DataLoader(chosen, batch_size=batch_size):
            self._pixels.append(batch["pixels"])
            on_device = {
                name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)
            }
            on_device["pixels"] = unit_pixels(on_device["pixels"])
            with torch.no_grad(), self._autocast():
                held = targets(on_device)
            teacher.append(widened(held.teachers[0].pooled))
            original.append(widened(held.original.pooled))
            if patch_layer is not None and self._original is None:
                self._keep_tokens(on_device["pixels"], held.original)
        self.teacher = torch.cat(teacher)  # (images, teacher width)
        self.original = torch.cat(original)  # (images, student width)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.teacher)

    def images(self, count: int) -> NDArray[np.uint8]:
        """Return the first images as the towers see them, (count, height, width, 3)."""
        pixels = torch.cat(self._pixels)[:count]
        if pixels.is_floating_point():
            pixels = (pixels * 255).round().to(torch.uint8)
        pictures: NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        return pictures

    def embed(self, count: int | None = None) -> Tensor:
        """Return the student's present embeddings of all or the first images, (images, width)."""
        needed = self.count if count is None else min(count, self.count)
        parts: list[Tensor] = []
        with self._measuring():
            for pixels in self._batches():
                parts.append(widened(self._run(self._student, pixels, None).pooled))
                if sum(map(len, parts)) >= needed:
                    break
        return torch.cat(parts)[:needed]

    def measure(self) -> dict[str, float]:
        """Return the kernel gap, the drift from the original and the likeness to the teacher.

        `heldout_kernel_gap_original` is the gap of the untouched tower under the kernel as it is
        now, so that a change of the kernel constants alone cannot pass for alignment.
        """
        pooled: list[Tensor] = []
        tokens = TokenDrift()
        with self._measuring(), self._original_at_hand():
            for number, pixels in enumerate(self._batches()):
                found = self._run(self._student, pixels, self._patch_layer)
                pooled.append(widened(found.pooled))
                if self._patch_layer is not None:
                    tokens.add(_patches(found), self._original_tokens(number, pixels))
            student = torch.cat(pooled)
            target = self._teacher_kernel(self.teacher)
            gap = kernel_gap(self._student_kernel(student), target).item()
            gap_original = kernel_gap(self._student_kernel(self.original), target).item()
        drift = embedding_drift(student, self.original)
        measured = {
            "heldout_kernel_gap": gap,
            "heldout_kernel_gap_original": gap_original,
            "heldout_cka_teacher": linear_cka(student, self.teacher),
            **{f"heldout_drift_{name}": value for name, value in drift.items()},
        }
        if self._patch_layer is not None:
            measured["heldout_patch_drift"] = tokens.relative()
        return measured

    def kernel_matrices(self, count: int = 64) -> dict[str, Tensor]:
        """Return the kernel matrices of the first images: original, student now, teacher."""
        with torch.no_grad():
            return {
                "original": self._student_kernel(self.original[:count]),
                "aligned": self._student_kernel(self.embed(count)),
                "teacher": self._teacher_kernel(self.teacher[:count]),
            }

    def _measuring(self) -> EvalMode:
        return EvalMode(self._student)

    @contextmanager
    def _original_at_hand(self) -> Iterator[None]:
        """Have the frozen original on the device, where cached targets have put it aside."""
        home = _device_of(self._original)
        if home is None or home == self._device:
            yield
            return
        self._original.to(self._device)
        try:
            yield
        finally:
            self._original.to(home)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16")

    def _batches(self) -> Iterator[Tensor]:
        for pixels in self._pixels:
            yield unit_pixels(pixels.to(self._device))

    def _run(self, tower: Any, pixels: Tensor, layer: int | None) -> Features:
        with self._autocast():
            if layer is None:
                return Features(tower(pixels), None)
            found: Features = tower.features(pixels, layer)
            return found

    def _keep_tokens(self, pixels: Tensor, original: Features) -> None:
        if original.patches is None:
            with self._measuring():
                student = self._run(self._student, pixels, self._patch_layer)
            if relative_token_drift(student.pooled, original.pooled) > _ROUNDING:
                raise ValueError(
                    "HeldOut was built after the student had moved, and its targets cannot run the "
                    "original: build it before a checkpoint is loaded"
                )
            original = student
        tokens = _patches(original)
        # float16 rounds eight times finer than bfloat16; tokens beyond 65504 need the latter.
        narrow = tokens.to(torch.float16)
        self._tokens.append((narrow if narrow.isfinite().all() else tokens.bfloat16()).cpu())

    def _original_tokens(self, number: int, pixels: Tensor) -> Tensor:
        if self._original is None:
            return self._tokens[number].to(self._device)
        return _patches(self._run(self._original, pixels, self._patch_layer))


class EvalMode:
    """Run a module in eval mode without gradient, and put its mode back."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self._was_training = self._module.training
        self._module.eval()
        self._no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._no_grad.__exit__(*error)
        self._module.train(self._was_training)


def _device_of(tower: Any) -> torch.device | None:
    if not isinstance(tower, torch.nn.Module):
        return None
    parameter = next(tower.parameters(), None)
    return None if parameter is None else parameter.device


def _patches(features: Features) -> Tensor:
    if features.patches is None:
        raise ValueError("a tower gave no patch tokens although a patch layer was asked for")
    return features.patches
