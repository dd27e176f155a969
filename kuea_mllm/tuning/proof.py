"""Reads a merged model back and compares it with the base and the LoRA weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kuea_mllm.errors import EnvironmentFailure
from kuea_mllm.model_files import TensorEntry, tensor_entries
from kuea_mllm.tuning.merged_state import MergedState

_CHECKED, _UNTOUCHED = 24, 24
_ROWS = 64


def prove_merge(
    base: Path, out: Path, places: Mapping[str, TensorEntry], state: MergedState
) -> int:
    """Make sure that what was written is W + scale * B A, and everything else the base's.

    The headers are compared as a whole; of changed and of other tensors, a sample of each is read.
    The expected values are computed anew, in float64.

    Args:
        base: The base's directory.
        out: The merged one.
        places: Changed tensors, name in the model -> place in the base.
        state: What was merged.

    Returns:
        How many changed tensors were compared.

    Raises:
        EnvironmentFailure: Naming the first tensor that is not as it should be.
    """
    before, after = tensor_entries(base), tensor_entries(out)
    if before != after:
        raise _failure(out, "the headers of its weight files")
    chosen = _spread(sorted(places), _CHECKED)
    for name in chosen:
        if not _is_as_computed(base, out, places[name], name, state):
            raise _failure(out, places[name].name)
    changed = {entry.name for entry in places.values()}
    files = {entry.file for entry in places.values()}
    others = sorted(n for n, entry in before.items() if n not in changed and entry.file in files)
    for name in _spread(others, _UNTOUCHED):
        if not torch.equal(_read(base, before[name]), _read(out, after[name])):
            raise _failure(out, name)
    return len(chosen)


def _is_as_computed(
    base: Path, out: Path, entry: TensorEntry, name: str, state: MergedState
) -> bool:
    rows = slice(0, _ROWS)
    written, old = _read(out, entry), _read(base, entry)
    update = state.update(name, torch.float64, rows)
    if update is None:
        return torch.equal(written, state.replacement(name).to(written.dtype))
    exact = old[rows].to(torch.float64) + update
    # Half a unit in the last place of what is stored, and the float32 of the sum before.
    largest = float(exact.abs().max())
    allowed = exact.abs() * torch.finfo(written.dtype).eps / 2 * 1.001
    allowed += largest * torch.finfo(torch.float32).eps * 16
    # Below the smallest normal number, units no longer shrink.
    allowed += torch.finfo(written.dtype).tiny
    return bool(((written[rows].to(torch.float64) - exact).abs() <= allowed).all())


def _spread(names: Sequence[str], count: int) -> list[str]:
    if len(names) <= count:
        return list(names)
    return [names[index * (len(names) - 1) // (count - 1)] for index in range(count)]


def _read(directory: Path, entry: TensorEntry) -> Tensor:
    with safe_open(directory / entry.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(entry.name)
    return tensor


def _failure(out: Path, what: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"the merged model does not read back as computed: {what} differs (writing {out}).",
        "The disk may be faulty; run the command again.",
    )
