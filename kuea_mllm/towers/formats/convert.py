"""Exact conversions between the layouts in which vision towers are circulated.

Every function maps one flat state dict to another by renaming, cutting, stacking and transposing;
no value and no dtype changes, so a round trip is equal bit for bit. (open_clip's own loader for
OpenAI dicts rounds weights to fp16 on the way: 1e-3 on the embeddings of a fine-tuned tower.)
All of them are strict: a key they do not know or miss is an error that names it. In between stands
the *canonical* layout of `keys`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.formats import keys

State = dict[str, Tensor]

_OTHER_HALF = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
_PARTS = ("q_proj", "k_proj", "v_proj")


def visual_to_canonical(state: Mapping[str, Tensor], where: str = "the state dict") -> State:
    """Convert an open_clip `visual` state dict (bare keys) to canonical names.

    Args:
        state: Tensors named as in the KUEA authors' `final.pt`; `proj` may be absent.
        where: What to call the source in errors.

    Raises:
        TowerError: If a key is unknown or missing.
    """
    source = _Strict(state, where)
    converted = {new: source.take(old) for old, new in keys.CLIP_OUTER.items()}
    if "proj" in state:
        # Stored (width, embedding) and multiplied from the right; nn.Linear holds the transpose.
        converted[keys.PROJECTION] = source.take("proj").T.contiguous()
    for index in range(count_blocks(state, keys.VISUAL_BLOCK)):
        block = f"{keys.VISUAL_BLOCK}{index}."
        converted |= _take_clip_block(source, block, f"{keys.HF_BLOCK}{index}.")
    source.finish()
    return converted


def canonical_to_visual(state: Mapping[str, Tensor], where: str = "the tower") -> State:
    """Convert canonical names of a CLIP tower to the open_clip `visual` layout.

    Raises:
        TowerError: If a key is unknown or missing (a tower without projection included).
    """
    source = _Strict(state, where)
    converted = {old: source.take(new) for old, new in keys.CLIP_OUTER.items()}
    converted["proj"] = source.take(keys.PROJECTION).T.contiguous()
    for index in range(count_blocks(state, keys.HF_BLOCK)):
        new = f"{keys.VISUAL_BLOCK}{index}."
        converted |= _take_hf_block(source, f"{keys.HF_BLOCK}{index}.", new)
    source.finish()
    return converted


def trunk_to_canonical(state: Mapping[str, Tensor], where: str = "the state dict") -> State:
    """Convert a timm SigLIP tower (keys below `trunk.`) to canonical names.

    Raises:
        TowerError: If a key is unknown or missing.
    """
    source = _Strict(state, where)
    at = keys.TRUNK_PREFIX
    converted = {new: source.take(at + old) for old, new in keys.SIGLIP_OUTER.items()}
    position = "embeddings.position_embedding.weight"
    converted[position] = converted[position][0]  # (1, patches, width) -> (patches, width)
    for kind in ("weight", "bias"):
        stacked = [source.take(f"{at}attn_pool.{part}.{kind}") for part in ("q", "kv")]
        converted[f"head.attention.in_proj_{kind}"] = torch.cat(stacked)
    for index in range(count_blocks(state, at + keys.TRUNK_BLOCK)):
        old, new = f"{at}{keys.TRUNK_BLOCK}{index}.", f"{keys.HF_BLOCK}{index}."
        for kind in ("weight", "bias"):
            for ours, theirs in keys.SIGLIP_BLOCK_MODULES.items():
                converted[f"{new}{theirs}.{kind}"] = source.take(f"{old}{ours}.{kind}")
            parts = _cut_in_three(source.take(f"{old}attn.qkv.{kind}"), f"{old}attn.qkv", where)
            for name, part in zip(_PARTS, parts, strict=True):
                converted[f"{new}self_attn.{name}.{kind}"] = part
    source.finish()
    return converted


def canonical_to_trunk(state: Mapping[str, Tensor], where: str = "the tower") -> State:
    """Convert canonical names of a SigLIP tower (with its head) to the timm trunk layout.

    Raises:
        TowerError: If a key is unknown or missing.
    """
    source = _Strict(state, where)
    at = keys.TRUNK_PREFIX
    converted = {at + old: source.take(new) for old, new in keys.SIGLIP_OUTER.items()}
    converted[f"{at}pos_embed"] = converted[f"{at}pos_embed"][None]
    for kind in ("weight", "bias"):
        stacked = source.take(f"head.attention.in_proj_{kind}")
        width = len(stacked) // 3
        converted[f"{at}attn_pool.q.{kind}"] = stacked[:width].contiguous()
        converted[f"{at}attn_pool.kv.{kind}"] = stacked[width:].contiguous()
    for index in range(count_blocks(state, keys.HF_BLOCK)):
        old, new = f"{at}{keys.TRUNK_BLOCK}{index}.", f"{keys.HF_BLOCK}{index}."
        for kind in ("weight", "bias"):
            for ours, theirs in keys.SIGLIP_BLOCK_MODULES.items():
                converted[f"{old}{ours}.{kind}"] = source.take(f"{new}{theirs}.{kind}")
            parts = [source.take(f"{new}self_attn.{part}.{kind}") for part in _PARTS]
            converted[f"{old}attn.qkv.{kind}"] = torch.cat(parts)
    source.finish()
    return converted


def hf_to_canonical(state: Mapping[str, Tensor]) -> State:
    """Bring a transformers state dict to canonical names, the text half left out.

    Accepts both key layouts (with and without `vision_model.`) and full `CLIPModel` or
    `SiglipModel` dicts. Whether the result is complete is checked when it meets a model.
    """
    canonical = {}
    for name in state:
        if not is_other_half(name):
            canonical[name.removeprefix(keys.HF_PREFIX)] = state[name]
    return canonical


def canonical_to_hf(state: Mapping[str, Tensor]) -> State:
    """Name tensors as transformers' `CLIPVisionModelWithProjection` does."""
    return {
        name if name == keys.PROJECTION else keys.HF_PREFIX + name: tensor
        for name, tensor in state.items()
    }


def is_other_half(name: str) -> bool:
    """Tell whether a transformers key is no vision weight: text half, logit scale, counters."""
    return name.startswith(_OTHER_HALF) or name.endswith(keys.IGNORED_SUFFIX)


def split_openai(state: Mapping[str, Tensor], where: str = "the state dict") -> tuple[State, State]:
    """Split a full OpenAI (or open_clip) CLIP dict into its bare visual half and the rest.

    Raises:
        TowerError: If there is no visual half, or a key belongs to neither half.
    """
    visual, text = {}, {}
    for name, tensor in state.items():
        if name.startswith(keys.VISUAL_PREFIX):
            visual[name.removeprefix(keys.VISUAL_PREFIX)] = tensor
        else:
            text[name] = tensor
    known = (*keys.TEXT_KEYS, *keys.OPENAI_METADATA)
    unknown = [n for n in text if n not in known and not n.startswith(keys.VISUAL_BLOCK)]
    if not visual or unknown:
        problem = f"unknown {_listed(unknown)}" if unknown else "no key starts with visual."
        raise TowerError(f"{where} is not a full CLIP state dict: {problem}.")
    return visual, text


def join_openai(visual: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> State:
    """Put a bare visual half back in front of the rest; the inverse of `split_openai`."""
    return {keys.VISUAL_PREFIX + name: tensor for name, tensor in visual.items()} | dict(text)


def openai_text_to_hf(text: Mapping[str, Tensor], where: str = "the state dict") -> State:
    """Convert the text half of an OpenAI dict to `CLIPTextModelWithProjection` names.

    Raises:
        TowerError: If a key is unknown or missing.
    """
    beside = ("logit_scale", *keys.OPENAI_METADATA)
    source = _Strict({n: t for n, t in text.items() if n not in beside}, where)
    converted = {new: source.take(old) for old, new in keys.TEXT_OUTER.items()}
    converted["text_projection.weight"] = source.take("text_projection").T.contiguous()
    for index in range(count_blocks(text, keys.VISUAL_BLOCK)):
        block = f"{keys.VISUAL_BLOCK}{index}."
        new = f"text_model.{keys.HF_BLOCK}{index}."
        converted |= _take_clip_block(source, block, new)
    source.finish()
    return converted


def hf_text_to_openai(state: Mapping[str, Tensor], where: str = "the state dict") -> State:
    """Convert the text half of a transformers `CLIPModel` to OpenAI's names, logit scale included.

    Raises:
        TowerError: If a key is unknown or missing.
    """
    source = _Strict(state, where)
    converted = {old: source.take(new) for old, new in keys.TEXT_OUTER.items()}
    converted["text_projection"] = source.take("text_projection.weight").T.contiguous()
    converted["logit_scale"] = source.take("logit_scale")
    prefix = f"text_model.{keys.HF_BLOCK}"
    for index in range(count_blocks(state, prefix)):
        new = f"{keys.VISUAL_BLOCK}{index}."
        converted |= _take_hf_block(source, f"{prefix}{index}.", new)
    source.finish()
    return converted


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return one more than the highest block number below `prefix`, zero without blocks."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = [int(match.group(1)) for name in names if (match := pattern.match(name))]
    return max(found, default=-1) + 1


def refuse_keys(where: str, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Raise an error that names missing and unknown keys, if there are any.

    Raises:
        TowerError: If one of the two is not empty.
    """
    missing, unknown = sorted(missing), sorted(unknown)
    problems = [f"lacks {_listed(missing)}"] if missing else []
    problems += [f"holds the unknown {_listed(unknown)}"] if unknown else []
    if problems:
        raise TowerError(
            f"{where} {' and '.join(problems)}.",
            "It is damaged, not complete, or of a layout that is not known here; docs/formats.md "
            "lists those that are.",
        )


class _Strict:
    """A state dict from which every tensor must be taken exactly once."""

    def __init__(self, state: Mapping[str, Tensor], where: str) -> None:
        self._state = state
        self._left = set(state)
        self._where = where

    def take(self, name: str) -> Tensor:
        if name not in self._left:
            self._missing(name)
        self._left.remove(name)
        return self._state[name]

    def finish(self) -> None:
        refuse_keys(self._where, missing=(), unknown=self._left)

    def _missing(self, name: str) -> None:
        refuse_keys(self._where, missing=[name], unknown=())


def _take_clip_block(source: _Strict, old: str, new: str) -> State:
    converted = {}
    for kind in ("weight", "bias"):
        for ours, theirs in keys.CLIP_BLOCK_MODULES.items():
            converted[f"{new}{theirs}.{kind}"] = source.take(f"{old}{ours}.{kind}")
        name = f"{old}attn.in_proj_{kind}"
        parts = _cut_in_three(source.take(name), name, source._where)
        for part_name, part in zip(_PARTS, parts, strict=True):
            converted[f"{new}self_attn.{part_name}.{kind}"] = part
    return converted


def _take_hf_block(source: _Strict, old: str, new: str) -> State:
    converted = {}
    for kind in ("weight", "bias"):
        for theirs, ours in keys.CLIP_BLOCK_MODULES.items():
            converted[f"{new}{theirs}.{kind}"] = source.take(f"{old}{ours}.{kind}")
        parts = [source.take(f"{old}self_attn.{part}.{kind}") for part in _PARTS]
        converted[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
    return converted


def _cut_in_three(stacked: Tensor, name: str, where: str) -> tuple[Tensor, Tensor, Tensor]:
    if len(stacked) % 3:
        raise TowerError(f"{where}: {name} has {len(stacked)} rows, no multiple of three.")
    query, key, value = stacked.chunk(3)
    return query, key, value


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'key' if len(names) == 1 else 'keys'} {shown}{more}"
