"""Normalisation inside of the towers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kuea_mllm.towers.model.encode import normalise

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


class Operations(TorchDispatchMode):
    """Notes what runs inside of its block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_normalise_is_exact_in_the_dtype_of_the_pixels() -> None:
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    shift, scale = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(normalise(pixels, MEAN, STD), (pixels - shift) / scale)


def test_normalise_copies_nothing_from_the_host() -> None:
    # On a GPU such a copy waits for all work that was queued: a sync in every step.
    with Operations() as seen:
        normalise(torch.empty(2, 3, 4, 4, device="meta"), MEAN, STD)
    assert "aten.sub.Tensor" in seen.names
    assert not {"aten.lift_fresh.default", "aten._to_copy.default"} & {*seen.names}
