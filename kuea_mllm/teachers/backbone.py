"""What every kind of vision model looks like to a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class RawOutput(NamedTuple):
    """Output of a vision model as its library gives it.

    Attributes:
        pooled: The model's own image embedding, (n, width), None if it has none.
        tokens: Its last hidden state, None if it has none.
    """

    pooled: Tensor | None
    tokens: Tensor | None


@dataclass(frozen=True)
class TokenLayout:
    """How to read the last hidden state of a model that has one token per patch.

    Attributes:
        grid: Patches per side.
        prefix: Tokens before the patches: class token and registers.
        has_class_token: Whether the first of them is a class token.
        norm: The final norm where the model leaves it out of its last hidden state, else None.
        width: Width of the tokens.
    """

    grid: int
    prefix: int
    has_class_token: bool
    norm: nn.Module | None
    width: int

    def normed(self, tokens: Tensor) -> Tensor:
        """Return tokens after the final norm."""
        if self.norm is None:
            return tokens
        result: Tensor = self.norm(tokens)
        return result


class Backbone(Protocol):
    """A vision model of one library, from normalised pixels to its raw output."""

    @property
    def model(self) -> nn.Module:
        """The library's own module."""

    @property
    def kind(self) -> str:
        """Its type, for errors."""

    @property
    def architecture(self) -> str:
        """All that shapes its output beside the weights: heads, activations, and their like."""

    def run(self, pixels: Tensor) -> RawOutput:
        """Run the model on normalised pixels, (n, 3, side, side)."""

    def token_layout(self, pixels: Tensor) -> TokenLayout | str:
        """Find out by a run how to read the tokens, or say in words why they cannot be."""
