"""A text partner whose embeddings are told, or drawn from the text."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kuea_mllm.probing.partner import TextPartner


class FakeText:
    """Stands in for `TextTower`."""

    source, fingerprint, context_length = "nowhere", "none", 77

    def __init__(
        self, vectors: Mapping[str, Sequence[float]] | None = None, width: int = 16
    ) -> None:
        self.vectors, self.width = vectors, width
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.seen += texts
        if self.vectors is not None:
            return torch.tensor([list(self.vectors[text]) for text in texts])
        return torch.stack([self._drawn(text) for text in texts])

    def _drawn(self, text: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return torch.randn(self.width, generator=generator)


def fake_partner(
    vectors: Mapping[str, Sequence[float]] | None = None, width: int = 16
) -> tuple[TextPartner, FakeText]:
    text = FakeText(vectors, width)
    return TextPartner(text, "a test"), text  # type: ignore[arg-type]
