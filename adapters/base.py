"""The contract between the toolkit and one multimodal model (no torch at import)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kuea_mllm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterManifest:
    """What an adapter package offers for discovery; light enough to be listed.

    Attributes:
        name: Short name, the one given to `--mllm`.
        summary: One line for listings, e.g. of `kuea-mllm doctor`.
        factory: "module:Class" of the adapter, imported only by `load`.
    """

    name: str
    summary: str
    factory: str

    def load(self) -> MLLMAdapter:
        """Import the factory and make the adapter.

        Raises:
            UserError: If the factory cannot be imported or does not make an adapter.
        """
        module, _, attribute = self.factory.partition(":")
        try:
            adapter = getattr(importlib.import_module(module), attribute)()
        # A third party's code runs here, so any kind of failure has to end in a line with its name.
        except Exception as error:
            raise UserError(
                f"adapter {self.name!r} cannot be loaded from {self.factory!r}: "
                f"{type(error).__name__}: {error}.",
                "Repair or uninstall the package that provides it.",
            ) from error
        if not isinstance(adapter, MLLMAdapter):
            raise UserError(
                f"adapter {self.name!r}: {self.factory!r} does not provide what "
                "kuea_mllm.adapters.base.MLLMAdapter asks for.",
                "Run kuea_mllm.adapters.conformance on it to see what is missing.",
            )
        return adapter


@dataclass(frozen=True)
class TowerSlot:
    """Where the vision tower of one base model sits and how it is read.

    Attributes:
        vision_config: The tower's configuration as the base model builds it, defaults filled in
            (keys as in `transformers.CLIPVisionConfig`).
        key_prefixes: What may stand before the tower's tensor names on disk, most specific first.
            What follows is a name of the vision body ("embeddings.class_embedding", ...).
        tap_layer: Index into `hidden_states` that the MLLM reads; negative counts from the end.
        drops_cls: Whether the class token is left out of what the MLLM sees.
        family: Tower family the slot takes, as in `TowerSpec.family` ("clip", "siglip").
        mean: Channel means the base normalises images with, or None if it does not say.
        std: Channel deviations likewise.
    """

    vision_config: Mapping[str, Any]
    key_prefixes: tuple[str, ...]
    tap_layer: int
    drops_cls: bool
    family: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One question to an MLLM.

    Attributes:
        prompt: The user's question, without any conversation template or image placeholder.
        images: PIL images, put before the question; empty for a text-only question.
    """

    prompt: str
    images: tuple[Image, ...] = ()


@runtime_checkable
class MLLMRuntime(Protocol):
    """A loaded model that answers questions."""

    def generate(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> list[str]:
        """Answer a batch of questions.

        An answer does not depend on what else is in the batch, apart from float rounding.

        Args:
            requests: The batch; rows with and without images may be mixed.
            max_new_tokens: Most tokens per answer.
            num_beams: Beam search width; 1 is greedy (or sampling).
            temperature: 0 decodes greedily; above 0 samples.
            top_p: Nucleus of the sampling; only with a temperature above 0.

        Returns:
            The new text of each request in order, without prompt and special tokens, stripped.

        Raises:
            UserError: If a request cannot be answered by this model, or an option is out of range.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Say how the model runs: at least `dtype`, `device` and `attention`, JSON values only."""
        ...

    def vision_state(self) -> Mapping[str, Tensor]:
        """Return the tensors of the tower that is really in use, named as in the vision body.

        A fingerprint of these proves which tower gave the answers.
        """
        ...


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
        """Describe the vision tower that a base model asks for; reads configuration files only.

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
