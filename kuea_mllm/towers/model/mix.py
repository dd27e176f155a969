"""Mix the weights of two towers (WiSE-FT: Wortsman et al. 2022, arXiv:2109.01903)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kuea_mllm.errors import TowerMismatch, UserError


def mix_states(
    original: Mapping[str, Tensor], tuned: Mapping[str, Tensor], weight: float
) -> Mapping[str, Tensor]:
    """Return `weight * tuned + (1 - weight) * original`, tensor by tensor, in float32.

    Mixing only makes sense between a tower and one that was fine-tuned from it: the average of
    two independent trainings is no tower at all.

    Args:
        original: Weights of one tower, any float dtype.
        tuned: Weights of the other, under the same names.
        weight: Share of `tuned`, in [0, 1]. 0 and 1 give the values of one side exactly.

    Returns:
        A read-only mapping that computes a tensor when it is asked for, so that a mix costs no
        memory of its own.

    Raises:
        UserError: If `weight` is out of range.
        TowerMismatch: If names or shapes differ.
    """
    if not 0.0 <= weight <= 1.0:
        raise UserError(
            f"the weight of a mix is {weight:g}, a number from 0 (original) to 1 was expected."
        )
    if different := sorted(original.keys() ^ tuned.keys()):
        raise TowerMismatch(
            f"the towers cannot be mixed: only one of them holds {different[0]} "
            f"({len(different)} such tensors)."
        )
    return _MixedState(original, tuned, weight)


class _MixedState(Mapping[str, Tensor]):
    def __init__(
        self, original: Mapping[str, Tensor], tuned: Mapping[str, Tensor], weight: float
    ) -> None:
        self._original, self._tuned, self._weight = original, tuned, weight

    def __getitem__(self, name: str) -> Tensor:
        original, tuned = (state[name].detach() for state in (self._original, self._tuned))
        if original.shape != tuned.shape:
            raise TowerMismatch(
                f"the towers cannot be mixed: {name} has shape {tuple(tuned.shape)} in one and "
                f"{tuple(original.shape)} in the other."
            )
        if self._weight in (0.0, 1.0):
            # No arithmetic: 0 * infinity would be NaN, and a sum could lose the sign of a zero.
            return (tuned if self._weight else original).to(torch.float32)
        return self._weight * tuned.to(torch.float32) + (1 - self._weight) * original.to(
            torch.float32
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)
