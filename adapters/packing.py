"""Rows that hold several samples: what keeps one from seeing another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.loading import FLASH

_OF_TOKENS = ("input_ids", "position_ids")


def without_rows(batch: Mapping[str, Tensor], attention: str) -> Mapping[str, Tensor]:
    """Return a batch of packed rows as the attention of transformers can tell samples apart.

    It does so by positions that begin anew, but only if there is neither an attention mask nor a
    cache; and flash attention only in a single row, so several rows are joined to one.

    Args:
        batch: As for `MLLMTuner.hidden_states`; one that is not packed is returned as it is.
        attention: Implementation in use.
    """
    if "position_ids" not in batch or attention != FLASH:
        return batch
    joined = {name: batch[name].reshape(1, -1) for name in _OF_TOKENS}
    return {**batch, **joined}


def side_by_side(input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Sequence[int]]:
    """Give each packed sample a row of its own, for models that cannot keep them apart.

    Args:
        input_ids: (rows, tokens).
        position_ids: Likewise, beginning at 0 in each sample.

    Returns:
        Ids padded on the right and their mask, (samples, longest); and the samples' lengths.
    """
    begins = position_ids != position_ids.roll(1, dims=1) + 1
    begins[:, 0] = True
    places = [*begins.flatten().nonzero().flatten().tolist(), begins.numel()]
    lengths = [end - start for start, end in pairwise(places)]
    samples: Any = torch.split(input_ids.flatten(), lengths)
    rows = nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
    sizes = torch.tensor(lengths, device=rows.device)
    return rows, torch.arange(rows.shape[1], device=rows.device) < sizes[:, None], lengths


def packed_again(states: Tensor, lengths: Sequence[int], shape: torch.Size) -> Tensor:
    """Put what was computed side by side back into packed rows.

    Args:
        states: (samples, longest, width).
        lengths: From `side_by_side`.
        shape: Of the packed rows.
    """
    packed = torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])
    return packed.view(*shape, -1)
