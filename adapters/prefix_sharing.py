"""The part of a prompt that many questions share, an image mostly, computed once.

A batch is laid out as [padding][prefix][padding][rest]: the keys and values of the prefixes come
from the cache, only the rest goes through the model for each question. Prompts are tokenized whole
and cut behind their last image token, so that every token is the one of the plain way; positions
are counted over real tokens. What differs is rounding, as between two batch sizes.

For models with plain causal attention and one position per token.

Memory: one prefix of LLaVA-1.5-7B is 611 tokens of 512 KiB in bfloat16, 0.3 GiB; prefixes of the
last batch are kept, those of earlier ones are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Key = tuple[tuple[str, ...], tuple[int, ...]]
Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (heads, tokens, width)."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of one question.

    Attributes:
        ids: All of them.
        prefix: How many lead up to the end of the last image; 0 without images.
        image_keys: Names of the images; empty if unknown, the prefix then serves this row alone.
    """

    ids: list[int]
    prefix: int
    image_keys: tuple[str, ...]

    @property
    def key(self) -> Key | None:
        """What two prompts have in common if one prefix serves both."""
        if not self.prefix or not self.image_keys:
            return None
        return self.image_keys, tuple(self.ids[: self.prefix])


class SharedPrefixes:
    """Lays batches out and remembers the prefixes of the last one."""

    def __init__(self) -> None:
        self._kept: dict[Key, Layers] = {}
        self._seen: set[Key] = set()
        self.computed = 0
        self.reused = 0

    def pay(self, prompts: Sequence[Prompt]) -> bool:
        """Say whether a prefix serves more than one question, of this batch and the one before.

        If not, what is kept is let go.
        """
        keys = [key for prompt in prompts if (key := prompt.key) is not None]
        before, self._seen = self._seen, set(keys)
        if len(self._seen) < len(keys) or not before.isdisjoint(keys):
            return True
        self._kept = {}
        return False

    def forget(self) -> None:
        """Let go of what is kept, as after running out of memory."""
        self._kept, self._seen = {}, set()

    def lay_out(
        self,
        prompts: Sequence[Prompt],
        prefill: Callable[[Sequence[int]], Any],
        *,
        pad_token_id: int,
        device: torch.device,
    ) -> dict[str, Any]:
        """Return the inputs of a batch.

        Args:
            prompts: One per row.
            prefill: Called with the numbers of some rows; returns the cache of the model after
                reading their prefixes, padded on the left as by `padded_left`.
            pad_token_id: What to fill up with.
            device: Where the model is.

        Returns:
            `input_ids` and `attention_mask`, (rows, width), and `past_key_values`, which holds the
            leading positions of them.
        """
        # The place stands for rows that share with nobody.
        keys = [prompt.key or place for place, prompt in enumerate(prompts)]
        found: dict[Key | int, Layers] = {k: v for k, v in self._kept.items() if k in keys}
        self._kept = {}
        missing = {
            key: place
            for place, key in reversed(list(enumerate(keys)))
            if prompts[place].prefix and key not in found
        }
        if missing:
            places = list(missing.values())
            layers = _split(prefill(places), [prompts[place].prefix for place in places])
            found.update(zip(missing, layers, strict=True))
        self.computed += len(missing)
        self.reused += sum(bool(prompt.prefix) for prompt in prompts) - len(missing)
        cache = _gather([found.get(key) for key in keys])
        self._kept = {key: kept for key, kept in found.items() if isinstance(key, tuple)}
        heads, head_mask = padded_left([p.ids[: p.prefix] for p in prompts], pad_token_id)
        rests, rest_mask = padded_left([p.ids[p.prefix :] for p in prompts], pad_token_id)
        return {
            "input_ids": torch.cat([heads, rests], dim=1).to(device),
            "attention_mask": torch.cat([head_mask, rest_mask], dim=1).to(device),
            "past_key_values": cache,
        }


def padded_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask of rows, (rows, longest), padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    # Not derived from the ids: the padding token may be a token that occurs in a prompt.
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        if row:
            ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1
    return ids, mask


def positions(attention_mask: Tensor) -> Tensor:
    """Count real tokens, from 0; padding anywhere is skipped."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def next_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs of `generate` as those of one forward pass, with positions.

    What the cache holds already is cut off.
    """
    cache = inputs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    return inputs | {
        "input_ids": inputs["input_ids"][:, past:],
        "position_ids": positions(inputs["attention_mask"])[:, past:],
    }


def holds_everything(cache: Any) -> bool:
    """Say whether every layer of a cache keeps all positions in the plain form."""
    from transformers.cache_utils import DynamicLayer

    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _split(cache: Any, lengths: Sequence[int]) -> list[Layers]:
    """Take a cache apart into rows, without their padding."""
    rows: list[Layers] = [[] for _ in lengths]
    for layer in cache.layers:
        for row, length, keys, values in zip(rows, lengths, layer.keys, layer.values, strict=True):
            # Copies: a view that is kept would keep the whole batch.
            row.append((keys[:, -length:].clone(), values[:, -length:].clone()))
        layer.keys = layer.values = None
    return rows


def _gather(rows: Sequence[Layers | None]) -> Any:
    """Put prefixes into one cache, padded on the left; None stands for an empty one."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    some = next(row for row in rows if row is not None)
    make_layer: Any = DynamicLayer
    cache: Any = DynamicCache()
    for number in range(len(some)):
        layer = make_layer()
        keys = _joined([None if row is None else row[number][0] for row in rows])
        values = _joined([None if row is None else row[number][1] for row in rows])
        layer.lazy_initialization(keys, values)
        # Not through `update`, which would copy them once more.
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    known = [part for part in parts if part is not None]
    width = max(part.shape[1] for part in known)
    if len(known) == len(parts) and all(part.shape[1] == width for part in known):
        return torch.stack(known)
    like = known[0]
    joined = like.new_zeros(len(parts), like.shape[0], width, like.shape[2])
    for row, part in zip(joined, parts, strict=True):
        if part is not None:
            row[:, width - part.shape[1] :] = part
    return joined
