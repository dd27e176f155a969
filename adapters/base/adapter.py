"""What every adapter provides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kuea_mllm.adapters.base.runtimes import MLLMRuntime
from kuea_mllm.adapters.base.slots import TowerSlot

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class MLLMAdapter(Protocol):
    """Everything the toolkit needs to know about one multimodal model."""

    @property
    def name(self) -> str:
        """Name of the adapter, equal to its manifest's."""
        ...

    def recognises(self, config: Mapping[str, object]) -> bool:
        """Say whether a model directory with this `config.json` belongs to this adapter.

        Directories of a kindred layout that the adapter refuses are recognised too, so that
        `check_base` can say what to do with them.
        """
        ...

    def check_base(self, base: Path) -> None:
        """Make sure that configuration, weights, processor and tokenizer are all there.

        Raises:
            UserError: Naming the file that is missing or the layout that is not supported.
        """
        ...

    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the vision tower that a base model asks for.

        Reads configuration files, and of weight files the headers at most; a directory without
        weights has a slot too.

        Raises:
            UserError: If the configuration does not describe a tower that can be swapped.
        """
        ...

    def vision_module(self, model: nn.Module) -> nn.Module:
        """Return the module of a loaded model that holds the vision tower.

        Raises:
            UserError: If the model is not of this adapter's kind.
        """
        ...

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        """Load a model directory for answering questions.

        Args:
            model_dir: Complete model directory (a base, or the output of `swap`).
            dtype: "float32", "float16" or "bfloat16"; taken exactly as asked.
            device: "cpu", "cuda" or "cuda:<index>"; taken exactly as asked.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        ...
