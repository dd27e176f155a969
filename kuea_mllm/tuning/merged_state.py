"""The tensors of a merged model, each computed when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kuea_mllm.adapters.lora_directory import LoraDirectory
from kuea_mllm.errors import EnvironmentFailure, UserError
from kuea_mllm.model_files import TensorEntry
from kuea_mllm.towers.files.shards import FileState


class MergedState(Mapping[str, Tensor]):
    """Every tensor that a merge changes, by its name in the model, in the base's dtype.

    One tensor is held at a time. Sizes of the update and of its rounding are added up while the
    tensors are read for the first time.

    Args:
        base: The base's directory.
        lora: What is merged.
        places: Name in the model -> place in the base.

    Raises:
        UserError: If a shape differs, or the base's weights are quantised.
    """

    def __init__(self, base: Path, lora: LoraDirectory, places: Mapping[str, TensorEntry]) -> None:
        self._stored = FileState(base, places)
        self._lora = lora
        self._places = places
        self._layers = {f"{layer}.weight": layer for layer in lora.pairs}
        self._seen: set[str] = set()
        self._moved = self._size = self._rounded = 0.0
        self._check_shapes(base)

    @property
    def dtype_names(self) -> str:
        """Dtypes of the tensors as they are stored, joined by "+"."""
        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return "+".join(sorted({names[self._places[name].dtype] for name in self}))

    @property
    def change(self) -> float:
        """|new - W| / |W| over the merged layers read so far."""
        return math.sqrt(self._moved / self._size) if self._size else 0.0

    @property
    def rounding(self) -> float:
        """|stored - exact| / |new - W| over the merged layers read so far."""
        return math.sqrt(self._rounded / self._moved) if self._moved else 0.0

    def update(self, name: str, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor | None:
        """Return scale * B A of a tensor, or of some of its rows; None if it is replaced whole."""
        layer = self._layers.get(name)
        if layer is None:
            return None
        pair = self._lora.pairs[layer]
        a, b = self._lora.tensors[pair.a].to(dtype), self._lora.tensors[pair.b][rows].to(dtype)
        return (b @ a) * pair.scale

    def replacement(self, name: str) -> Tensor:
        """Return a tensor that was trained as a whole, as it was saved."""
        return self._lora.tensors[self._lora.whole[name]]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        old = self._stored[name]
        update = self.update(name, torch.float32)
        if update is None:
            new = self.replacement(name).to(old.dtype)
            is_finite = bool(torch.isfinite(new).all())
        else:
            new, is_finite = self._merged(name, old, update)
        if not is_finite:
            raise EnvironmentFailure(
                f"merged tensor {name} holds NaN or infinity in {old.dtype} of the base.",
                "The weights are damaged, or too large for the dtype; merge into a base in "
                "bfloat16 or float32.",
            )
        return new

    def _merged(self, name: str, old: Tensor, update: Tensor) -> tuple[Tensor, bool]:
        """Return the merged tensor and whether it is finite; `update` is used up."""
        # A copy also where the base is float32: its own memory is the mapped file.
        exact = old.to(torch.float32, copy=True)
        moved, size = _square(update), _square(exact)
        new = exact.add_(update).to(old.dtype, copy=True)
        # Infinite or no number as soon as one value is, which spares a pass over all of them.
        rounded = _square(exact.sub_(new))
        if name not in self._seen:
            self._seen.add(name)
            self._moved, self._size = self._moved + moved, self._size + size
            self._rounded += rounded
        return new, math.isfinite(rounded) or bool(torch.isfinite(new).all())

    def __iter__(self) -> Iterator[str]:
        yield from self._layers
        yield from self._lora.whole

    def __contains__(self, name: object) -> bool:
        return name in self._layers or name in self._lora.whole

    def __len__(self) -> int:
        return len(self._layers) + len(self._lora.whole)

    def _check_shapes(self, base: Path) -> None:
        for name in self:
            entry, found = self._places[name], self._shape(name)
            if entry.shape != found:
                raise UserError(
                    f"{name} has shape {entry.shape} in {base}, the LoRA weights in "
                    f"{self._lora.path} are for {found}.",
                    "They belong to another model.",
                )
            if entry.dtype not in ("F64", "F32", "F16", "BF16"):
                raise UserError(
                    f"{entry.name} of {base} is stored as {entry.dtype}, which is quantised.",
                    "Merge into the unquantised model that it was made from.",
                )

    def _shape(self, name: str) -> tuple[int, ...]:
        tensors = self._lora.tensors
        layer = self._layers.get(name)
        if layer is None:
            return tuple(self.replacement(name).shape)
        pair = self._lora.pairs[layer]
        return (tensors[pair.b].shape[0], tensors[pair.a].shape[1])


def _square(values: Tensor) -> float:
    flat = values.flatten()
    return float(torch.dot(flat, flat))
