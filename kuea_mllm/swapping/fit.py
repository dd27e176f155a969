"""Whether a tower fits the place it is meant for, and its weights as that place takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.errors import TowerMismatch
from kuea_mllm.model_files import TensorEntry
from kuea_mllm.swapping.report import Check
from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.formats.locate import OPTIONAL
from kuea_mllm.towers.spec import TowerSpec, Triple, default_preprocessing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_SAME_SIZE = "Take a tower of the same architecture as the one that the base was trained with."
_DEPTH = (
    f"{_SAME_SIZE} Some bases keep only the first blocks of a published tower (LLaVA-OneVision "
    "26 of SigLIP's 27); kuea-mllm leaves none out by itself."
)
_RESIZE = (
    "Take a tower made for that size, or make one: `kuea-mllm convert TOWER NEW --image-size N`."
)
_ACTIVATION = (
    "A wrong activation lowers scores without any warning; pass --activation only if you know that "
    "the tower was trained with it."
)
_EPSILON = "The base would run the tower with its own epsilon, which changes every norm a little."
_COLOURS = "The base normalises images in its own way; the tower would see wrong colours."

# What a reader calls it, key of the base's configuration, field of the spec, what to do, --force.
_ARCHITECTURE = (
    ("width", "hidden_size", "width", _SAME_SIZE, False),
    ("number of layers", "num_hidden_layers", "layers", _DEPTH, False),
    # Shapes do not depend on it, but no training survives another cut of queries and keys.
    ("number of heads", "num_attention_heads", "heads", _SAME_SIZE, False),
    ("MLP width", "intermediate_size", "mlp_width", _SAME_SIZE, False),
    ("patch size", "patch_size", "patch_size", _SAME_SIZE, False),
    ("image size", "image_size", "image_size", _RESIZE, False),
    ("activation", "hidden_act", "activation", _ACTIVATION, True),
    ("layer norm epsilon", "layer_norm_eps", "layer_norm_eps", _EPSILON, True),
)


def architecture_checks(slot: TowerSlot, spec: TowerSpec) -> list[Check]:
    """Compare a tower's architecture and preprocessing with what a base asks for.

    Args:
        slot: The base's side.
        spec: The tower's side.
    """
    checks = [_check("family", slot.family, spec.family, _SAME_SIZE)]
    for what, key, field, remedy, can_force in _ARCHITECTURE:
        base, tower = slot.vision_config.get(key), getattr(spec, field)
        checks.append(_check(what, base, tower, remedy, can_force=can_force))
    for what, expected in (("mean", slot.mean), ("std", slot.std)):
        name, found = f"image {what}", getattr(spec, what)
        if expected is None:
            checks.append(Check(name, "not stated", _text(found)))
        else:
            checks.append(_check(name, expected, found, _COLOURS, can_force=True))
    return checks


def spec_of_slot(slot: TowerSlot, *, embedding_width: int | None = None) -> TowerSpec:
    """Return the spec of the tower that a slot describes.

    Args:
        slot: The base's side; where it does not say how images are normalised, the family's usual
            values are taken.
        embedding_width: Width of the projected embedding; a base without one has the tower's width.
    """
    usual = default_preprocessing("siglip" if slot.family == "siglip" else "clip")
    sizes: dict[str, Any] = {
        field: slot.vision_config[key] for _, key, field, _, _ in _ARCHITECTURE
    }
    return TowerSpec(
        family="siglip" if slot.family == "siglip" else "clip",
        embedding_width=embedding_width or int(sizes["width"]),
        mean=_triple(slot.mean) or usual.mean,
        std=_triple(slot.std) or usual.std,
        resize=usual.resize,
        **sizes,
    )


class FittedState(Mapping[str, Tensor]):
    """A tower's tensors for each place in the base, on the CPU, in the base's dtype.

    A tensor is cast when it is asked for, so that no second copy of the tower is held.

    Args:
        source: The new tower, by canonical name; names that the base does not hold are left out.
        targets: The base's tensors (or where they lie), by canonical name.
        where: What to call the base in messages.

    Raises:
        TowerMismatch: If names, shapes or dtypes do not fit.
    """

    def __init__(
        self,
        source: Mapping[str, Tensor],
        targets: Mapping[str, TensorEntry] | Mapping[str, Tensor],
        where: str,
    ) -> None:
        body = {name for name in source if name != keys.PROJECTION}
        for names, problem in (
            (body - targets.keys(), "lacks"),
            (targets.keys() - source.keys(), "has"),
        ):
            # A pooling head that the tower lacks stays as it is: no MLLM reads it.
            needed = sorted(name for name in names if not name.startswith(OPTIONAL))
            if needed:
                raise TowerMismatch(
                    f"{where} {problem} {len(needed)} tower tensors, first {needed[0]}, which the "
                    f"new tower {'has' if problem == 'lacks' else 'lacks'}.",
                    _SAME_SIZE,
                )
        self._source = source
        self._dtypes: dict[str, torch.dtype] = {}
        for name, target in targets.items():
            if name not in source or name == keys.PROJECTION:
                continue
            shape = tuple(source[name].shape)
            if shape != tuple(target.shape):
                raise TowerMismatch(
                    f"the tower does not fit {where}: its {name} has shape {shape}, the base has "
                    f"{tuple(target.shape)}.",
                    _SAME_SIZE,
                )
            self._dtypes[name] = _float_dtype(name, target.dtype, where)

    def __getitem__(self, name: str) -> Tensor:
        return self.both(name)[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)

    @property
    def dtype_names(self) -> str:
        """The dtypes of all tensors, joined by "+"."""
        return "+".join(sorted({_name(dtype) for dtype in self._dtypes.values()}))

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a tensor as the tower holds it and as it will be stored, read once."""
        source = self._source[name].detach().to("cpu")
        return source, source.to(self._dtypes[name])


def _float_dtype(name: str, dtype: str | torch.dtype, where: str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise TowerMismatch(
            f"the tower tensor {name} of {where} is stored as {dtype}, which is quantised.",
            "Swap the tower into the unquantised model, and quantise it afterwards.",
        )
    return found


def _triple(values: tuple[float, ...] | None) -> Triple | None:
    if values is None:
        return None
    red, green, blue = values
    return red, green, blue


def _check(name: str, expected: Any, found: Any, remedy: str, *, can_force: bool = False) -> Check:
    if _equal(expected, found):
        return Check(name, _text(expected), _text(found))
    return Check(name, _text(expected), _text(found), "refuse", remedy, can_force)


def _equal(expected: Any, found: Any) -> bool:
    if isinstance(expected, tuple):
        return len(expected) == len(found) and all(map(_equal, expected, found))
    if isinstance(expected, float):
        return abs(expected - float(found)) <= 1e-4 * abs(expected)
    return bool(expected == found)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{number:.4g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
