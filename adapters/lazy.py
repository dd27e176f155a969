"""Adapters whose runtime and tuning lie in modules of their own, loaded when they are needed.

An adapter is asked about configuration files by verbs that shall start at once, so its own module
loads no torch. What needs it lies in two modules beside: the runtime, and the tuner.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kuea_mllm.adapters.base import MLLMRuntime, TowerSlot, TuningFormat, TuningParts
from kuea_mllm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


class RuntimeClass(Protocol):
    """The class of a runtime."""

    def load(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        """Load a directory; see `MLLMAdapter.open_runtime`."""
        ...


class TunerModule(Protocol):
    """What a module about the tuning of one kind of model holds; see `MLLMTuner`."""

    def tuning_parts(self, base: Path) -> TuningParts:
        """Return where the parts are."""
        ...

    def tuning_format(self, base: Path, *, max_length: int) -> TuningFormat:
        """Return how samples are read."""
        ...

    def hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the output layer reads."""
        ...

    def image_features(self, model: Any, pixel_values: Tensor) -> Tensor:
        """Return what the language model gets of images."""
        ...


class LazyAdapter(ABC):
    """What adapters of models that answer and can be tuned have in common.

    A subclass gives its name, what is said of configuration files, and where the rest lies.

    Attributes:
        name: Of the adapter.
        model_name: Class that `vision_module` expects, for messages.
    """

    name: str
    model_name: ClassVar[str]

    @abstractmethod
    def check_base(self, base: Path) -> None:
        """Make sure that a directory is complete; see `MLLMAdapter`."""

    @abstractmethod
    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the tower of a directory; see `MLLMAdapter`."""

    @abstractmethod
    def _model_class(self, base: Path) -> tuple[Any, Any]:
        """Return the model class of a directory, and its configuration."""

    @abstractmethod
    def _runtime(self) -> RuntimeClass:
        """Import the runtime."""

    @abstractmethod
    def _tuner(self) -> TunerModule:
        """Import the module about tuning."""

    def _check_loadable(self, base: Path) -> None:
        # Before the slow part: the same refusals as for a swap.
        self.check_base(base)
        self.tower_slot(base)

    def vision_module(self, model: nn.Module) -> nn.Module:
        """Return the vision tower of a loaded model.

        Raises:
            UserError: If the model has no such part.
        """
        tower: nn.Module | None = getattr(getattr(model, "model", model), "vision_tower", None)
        if tower is None:
            raise UserError(
                f"a {type(model).__name__} has no vision_tower; "
                f"the {self.name} adapter expects {self.model_name}."
            )
        return tower

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        """Load a directory for answering questions.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        self._check_loadable(model_dir)
        return self._runtime().load(model_dir, dtype=dtype, device=device)

    def tuning_parts(self, base: Path) -> TuningParts:
        """Return where the parts are that tuning trains or leaves alone.

        Raises:
            UserError: If the model cannot be tuned, or its files do not belong together.
        """
        return self._tuner().tuning_parts(base)

    def tuning_format(self, base: Path, *, max_length: int) -> TuningFormat:
        """Return how samples are read: conversation format and image preprocessing.

        Raises:
            UserError: If tokenizer or processor are missing or follow another format.
        """
        return self._tuner().tuning_format(base, max_length=max_length)

    def build_empty(self, base: Path) -> nn.Module:
        """Return the model of a directory on the meta device."""
        from kuea_mllm.adapters.loading import empty_model

        return empty_model(*self._model_class(base))

    def load_for_tuning(
        self, base: Path, *, dtype: str, device: str, quantization: object | None = None
    ) -> nn.Module:
        """Load a directory to be tuned.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        self._check_loadable(base)
        from kuea_mllm.adapters.loading import load_for_tuning

        loader, _ = self._model_class(base)
        return load_for_tuning(
            loader,
            base,
            dtype=dtype,
            device=device,
            quantization=quantization,
            unquantised=() if quantization is None else self._tuner().tuning_parts(base).whole,
        )

    def hidden_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the output layer reads, (rows, tokens, width)."""
        return self._tuner().hidden_states(model, batch)

    def image_features(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Return what the language model gets of images, (images, tokens, width)."""
        return self._tuner().image_features(model, pixel_values)
