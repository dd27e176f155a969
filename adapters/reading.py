"""What an adapter can say about settings that change which tokens a model reads (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class ReadingProblem:
    """A setting of a model directory that is not the one that the model was trained with.

    Attributes:
        setting: File and key.
        found: What it says.
        usual: What the model was trained with.
        consequence: What happens because of it.
    """

    setting: str
    found: str
    usual: str
    consequence: str


@runtime_checkable
class ChecksReading(Protocol):
    """An adapter that knows how its model was trained to read the tower; optional."""

    def reading_problems(self, base: Path) -> Sequence[ReadingProblem]:
        """Compare a directory's settings with those of the model's training.

        Reads configuration files only; settings that make the model unusable are refused by
        `check_base` instead.
        """
        ...
