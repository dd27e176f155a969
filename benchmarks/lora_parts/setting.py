"""What the variants share: the setting, and the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.config.lora import LoraRecipe
from lora_parts.models import Size
from lora_parts.samples import Samples


class Clock(TrainerCallback):
    """Times the second pass over the samples."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._epochs = 0
        self._started = 0.0
        self.seconds = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Start at the second."""
        self._epochs += 1
        if self._epochs == 2:
            synchronise(self._device)
            self._started = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        synchronise(self._device)
        self.seconds = time.perf_counter() - self._started


@dataclass(frozen=True)
class Setting:
    """Everything that the variants share."""

    size: Size
    base: Path
    device: str
    dtype: str
    quantization: Literal["none", "nf4"]
    packing: bool

    def recipe(self) -> LoraRecipe:
        """Return the recipe of ours."""
        size = self.size
        content = {
            "kind": "lora",
            "model": {"path": str(self.base), "quantization": self.quantization},
            "data": {
                "file": "synthetic",
                "max_length": size.max_length,
                "packing": self.packing,
                "workers": 0,
            },
            "lora": {"rank": size.rank, "alpha": 2 * size.rank},
            "optim": {
                "micro_batch_size": size.micro_batch,
                "accumulation": size.accumulation,
                "epochs": 2,
            },
            "runtime": {"device": self.device, "dtype": self.dtype, "log_every": 10_000},
        }
        return LoraRecipe.parse(content, origin="benchmark").resolved()

    def samples(self) -> Samples:
        """Return the samples."""
        reading = LlavaAdapter().tuning_format(self.base, max_length=self.size.max_length)
        parts = LlavaAdapter().tuning_parts(self.base)
        return Samples(self.size, parts.vocabulary_size, reading.tokens_per_image)


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
