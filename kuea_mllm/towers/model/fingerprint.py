"""Content hashes of towers: the same weights hash the same in every layout and dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.formats import convert, keys

ROUNDINGS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_BODY = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")


def fingerprint_state(state: Mapping[str, Tensor], *, rounded_to: torch.dtype | None = None) -> str:
    """Hash the vision body of a tower: embeddings, blocks and norms.

    Left out are the projection and SigLIP's pooling head, which MLLMs do not keep, the text half,
    and `position_ids` counters. Tensors are read one at a time, so a lazy mapping is never held
    in memory as a whole.

    Args:
        state: Weights named as by transformers, with or without `vision_model.`, or an open_clip
            visual or timm trunk state dict.
        rounded_to: Round to this dtype first, to recognise a float32 tower in the float16 or
            bfloat16 copy that an MLLM holds.

    Returns:
        A sha256 as 64 hexadecimal digits, over canonical names, shapes and float32 values.

    Raises:
        TowerError: If there is no vision body in `state`.
    """
    return fingerprint_tensors(_body(state), rounded_to=rounded_to)


def fingerprint_all(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return `fingerprint_state` under each rounding, keyed "float32", "float16", "bfloat16".

    Every tensor is read once. A tower that was stored in half precision has equal fingerprints
    under that rounding and under "float32", and is hashed only once for both.
    """
    # Roundings whose values were the same so far share one digest, which is split when they part.
    digests = [(hashlib.sha256(), list(ROUNDINGS))]
    for name, tensor in _body(state):
        values = tensor.detach().to("cpu")
        parted: list[tuple[Any, list[str]]] = []
        for digest, members in digests:
            lossy = [member for member in members if _is_lossy(values.dtype, ROUNDINGS[member])]
            exact = [member for member in members if member not in lossy]
            for group in (exact, *([member] for member in lossy)):
                if group:
                    own = digest.copy()
                    _update(own, name, values, ROUNDINGS[group[0]] if group != exact else None)
                    parted.append((own, group))
        digests = parted
    found = {member: digest.hexdigest() for digest, members in digests for member in members}
    return {name: found[name] for name in ROUNDINGS}


def fingerprint_tensors(
    tensors: Iterable[tuple[str, Tensor]], *, rounded_to: torch.dtype | None = None
) -> str:
    """Hash named tensors in the order given; see `fingerprint_state` for the arguments."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        _update(digest, name, tensor.detach().to("cpu"), rounded_to)
    return digest.hexdigest()


def _update(digest: Any, name: str, values: Tensor, rounded_to: torch.dtype | None) -> None:
    digest.update(f"{name} {tuple(values.shape)}\n".encode())
    if rounded_to is not None:
        values = values.to(rounded_to)
    digest.update(values.to(torch.float32).contiguous().numpy().data)


def _is_lossy(stored: torch.dtype, rounded_to: torch.dtype) -> bool:
    return rounded_to not in (stored, torch.float32)


def _body(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if "class_embedding" in state:
        state = convert.visual_to_canonical(state)
    elif any(name.startswith(keys.TRUNK_PREFIX) for name in state):
        state = convert.trunk_to_canonical(state)
    names = {}
    for name in state:
        canonical = name.removeprefix(keys.HF_PREFIX)
        if canonical.startswith(_BODY) and not canonical.endswith(keys.IGNORED_SUFFIX):
            names[canonical] = name
    if not any(name.startswith(keys.HF_BLOCK) for name in names):
        raise TowerError("no vision tower among the tensors: none is named encoder.layers.*.")
    for canonical in sorted(names):
        yield canonical, state[names[canonical]]
