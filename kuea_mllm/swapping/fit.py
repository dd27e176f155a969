"""Whether a tower fits the place it is meant for; every check comes before the first write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.adapters.checkpoint import TensorEntry
from kuea_mllm.errors import TowerMismatch
from kuea_mllm.towers import keys
from kuea_mllm.towers.spec import TowerSpec
from kuea_mllm.towers.tower import Tower

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# (what a reader calls it, key of the base's configuration, field of the spec, what to do)
_SAME_SIZE = "Take a tower of the same architecture as the one that the base was trained with."
_RESIZE = (
    "Take a tower made for that size; kuea_mllm.towers.interpolate.resize_tower makes one in "
    "Python."
)
_ACTIVATION = (
    "A wrong activation lowers scores without any warning; pass --activation only if you know that "
    "the tower was trained with it."
)
_CHECKS = (
    ("width", "hidden_size", "width", _SAME_SIZE),
    ("number of layers", "num_hidden_layers", "layers", _SAME_SIZE),
    ("number of heads", "num_attention_heads", "heads", _SAME_SIZE),
    ("MLP width", "intermediate_size", "mlp_width", _SAME_SIZE),
    ("patch size", "patch_size", "patch_size", _SAME_SIZE),
    ("image size", "image_size", "image_size", _RESIZE),
    ("activation", "hidden_act", "activation", _ACTIVATION),
    ("layer norm epsilon", "layer_norm_eps", "layer_norm_eps", _SAME_SIZE),
)

# SigLIP's pooling head: no MLLM reads it, and some bases do not keep it.
_OPTIONAL = "head."


def check_fit(slot: TowerSlot, spec: TowerSpec, where: str) -> list[dict[str, Any]]:
    """Compare a tower's architecture and preprocessing with what a base asks for.

    Args:
        slot: The base's side.
        spec: The tower's side.
        where: What to call the base in messages.

    Returns:
        One record per comparison: `check`, `value`.

    Raises:
        TowerMismatch: At the first difference.
    """
    pairs: list[tuple[str, Any, Any, str]] = [("family", slot.family, spec.family, _SAME_SIZE)]
    for what, key, field, remedy in _CHECKS:
        pairs.append((what, slot.vision_config.get(key), getattr(spec, field), remedy))
    normalisation = "The base normalises images in its own way; the tower would see wrong colours."
    for what, expected in (("mean", slot.mean), ("std", slot.std)):
        if expected is not None:
            pairs.append((f"image {what}", expected, getattr(spec, what), normalisation))
    for what, expected, found, remedy in pairs:
        if not _equal(expected, found):
            raise TowerMismatch(
                f"the tower does not fit {where}: its {what} is {found}, the base asks for "
                f"{expected}.",
                remedy,
            )
    return [{"check": what, "value": found} for what, _, found, _ in pairs]


def fitted_state(
    tower: Tower, targets: Mapping[str, TensorEntry] | Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Return the tower's tensors for each place in the base, on the CPU, in the base's dtype.

    Args:
        tower: The tower to put in.
        targets: The base's tensors (or where they lie), by canonical name.
        where: What to call the base in messages.

    Raises:
        TowerMismatch: If names or shapes differ, or a dtype cannot take the values.
    """
    source = {k: t for k, t in tower.canonical_state().items() if k != keys.PROJECTION}
    missing = sorted(n for n in source.keys() - targets.keys() if not n.startswith(_OPTIONAL))
    unknown = sorted(targets.keys() - source.keys())
    for names, problem in ((missing, "lacks"), (unknown, "has")):
        if names:
            raise TowerMismatch(
                f"{where} {problem} {len(names)} tower tensors, first {names[0]}, which the new "
                f"tower {'has' if problem == 'lacks' else 'lacks'}.",
                _SAME_SIZE,
            )
    return {
        name: _cast(name, source[name], tuple(target.shape), target.dtype, where)
        for name, target in targets.items()
    }


def _cast(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: str | torch.dtype, where: str
) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise TowerMismatch(
            f"the tower does not fit {where}: its {name} has shape {tuple(tensor.shape)}, the base "
            f"has {shape}.",
            _SAME_SIZE,
        )
    torch_dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype not in _DTYPES.values():
        raise TowerMismatch(
            f"the tower tensor {name} of {where} is stored as {dtype}, which is quantised.",
            "Swap the tower into the unquantised model, and quantise it afterwards.",
        )
    cast = tensor.detach().to("cpu", torch_dtype)
    if not bool(torch.isfinite(cast).all()):
        raise TowerMismatch(
            f"the new tower's {name} has values that {torch_dtype} of {where} cannot hold, or that "
            "are not finite.",
            "Check the tower (its training may have diverged), or use a base in bfloat16.",
        )
    return cast


def require_change(before: str, after: str, tower: Tower, where: str, *, allow_same: bool) -> None:
    """Refuse a swap that would change nothing.

    Raises:
        TowerMismatch: If both fingerprints are equal and that was not allowed.
    """
    if before == after and not allow_same:
        raise TowerMismatch(
            f"the tower {tower.source} is the one that {where} holds already ({before[:12]}).",
            "Check the path of the tower; nothing was written.",
        )


def _equal(expected: Any, found: Any) -> bool:
    if isinstance(expected, tuple):
        close = (_equal(one, other) for one, other in zip(expected, found, strict=True))
        return all(close)
    if isinstance(expected, float):
        return abs(expected - float(found)) <= 1e-4 * abs(expected)
    return bool(expected == found)
