"""What an adapter may provide on top: the way from and to the files that authors publish."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class MLLMImporter(Protocol):
    """What an adapter may provide on top: turning its model's released form into one it supports.

    For models whose authors publish them in a layout of their own.
    """

    def import_released(
        self, source: Path, destination: Path, *, tower: str | None, command: str | None
    ) -> None:
        """Write a complete model directory from a released one.

        Args:
            source: Released model directory, which is left as it is.
            destination: Directory to create.
            tower: Where to take the vision tower from if the release only names it; None takes what
                the release says.
            command: Command line to record.

        Raises:
            UserError: If the release is incomplete or of another layout, or `destination` exists.
        """
        ...


@runtime_checkable
class MLLMPartsImporter(Protocol):
    """What an adapter provides instead, if its model is released in parts that lie apart."""

    def import_parts(
        self,
        source: Path,
        destination: Path,
        *,
        language_model: Path | None,
        tokenizer: Path | None,
        tower: str | None,
        activation: str | None,
        heads: int | None,
        command: str | None,
        accept: Collection[str] = (),
    ) -> None:
        """Write a complete model directory from the parts of a release.

        Args:
            source: The trained part, or a directory that holds all parts; left as it is.
            destination: Directory to create.
            language_model: Directory of the language model; None where it lies in `source`.
            tokenizer: Directory of the tokenizer; None takes the language model's.
            tower: The vision tower, anything that `load_tower` takes; None takes the release's.
            activation: The tower's, where its files do not state it.
            heads: Likewise.
            command: Command line to record.
            accept: Differences from the release that are meant; each adapter names its own.

        Raises:
            UserError: If a part is missing, incomplete or does not fit the others, or `destination`
                exists.
        """
        ...


@runtime_checkable
class MLLMExporter(Protocol):
    """What an adapter may provide on top: the way back to the files of a release."""

    def export_released(self, source: Path, destination: Path) -> None:
        """Write a model directory as its authors release theirs; the inverse of the import.

        Args:
            source: Model directory in Hugging Face form.
            destination: Directory to create.

        Raises:
            UserError: If `source` is incomplete, or `destination` exists.
        """
        ...


@runtime_checkable
class LoraConverter(Protocol):
    """What an adapter may provide on top: LoRA weights in its model's released layout, and back."""

    def import_lora(self, source: Path, destination: Path, *, command: str | None) -> None:
        """Write released LoRA weights as a PEFT directory for the Hugging Face form.

        Args:
            source: Directory in the authors' layout; left as it is.
            destination: Directory to create.
            command: Command line to record.

        Raises:
            UserError: If the source is incomplete or of another layout, or `destination` exists.
        """
        ...

    def export_lora(self, source: Path, destination: Path, *, tower: str | None) -> None:
        """Write LoRA weights as the authors' code saves them; the inverse of the import.

        Args:
            source: PEFT directory.
            destination: Directory to create.
            tower: What the authors' configuration shall name as vision tower, where nothing says.

        Raises:
            UserError: If the layout has no place for something, or `destination` exists.
        """
        ...
