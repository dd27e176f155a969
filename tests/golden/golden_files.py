"""Find and read golden files.

`KUEA_GOLDEN_DIR` points the golden tests at another set of the same layout. Sizes, case names and
values belong to a set: tests read them from its `index.json` and hard-code none.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def golden_root() -> Path:
    """Return the directory that holds `align/` (and the other groups)."""
    return Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent))


def align_dir() -> Path:
    """Return the directory of the alignment goldens."""
    return golden_root() / "align"


@cache
def align_index() -> dict[str, Any]:
    """Return the content of `align/index.json`."""
    content: dict[str, Any] = json.loads((align_dir() / "index.json").read_text())
    return content


def files(pattern: str) -> list[str]:
    """Return the names in the index that match a regular expression from start to end."""
    return [name for name in align_index()["files"] if re.fullmatch(pattern, name)]


def hyper_parameters(name: str) -> dict[str, Any]:
    """Return the hyper-parameters that the index states for one file."""
    found: dict[str, Any] = align_index()["files"][name]["hyper_parameters"]
    return found


@cache
def _tensors(name: str) -> dict[str, Tensor]:
    return load_file(align_dir() / name)


def tensors(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, the floating ones in `dtype` if one is given."""
    return {
        key: t.to(dtype) if dtype is not None and t.is_floating_point() else t
        for key, t in _tensors(name).items()
    }


def prefixes(name: str, suffix: str) -> list[str]:
    """Return the cases of a file: what stands before `suffix` in the names of its tensors."""
    listed = align_index()["files"][name]["tensors"]
    return [key.removesuffix(suffix) for key in listed if key.endswith(suffix)]


def checkpoint_of(name: str) -> list[Path]:
    """Return the checkpoints that the description of a tower file names."""
    about = align_index()["files"][name]["about"]
    found = re.findall(r"ckpt/[\w.*]+[\w*]", about)
    return sorted({path for pattern in found for path in align_dir().glob(pattern)})


@dataclass(frozen=True)
class GoldenFile:
    """One safetensors file with what the index says about it."""

    name: str

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """The hyper-parameters of the file."""
        return hyper_parameters(self.name)

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return list(_tensors(self.name))

    def __getitem__(self, name: str) -> Tensor:
        """Return a copy of one tensor, as stored."""
        return _tensors(self.name)[name].clone()


def relative_error(found: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """Return the largest difference in units of the largest expected number, at least `floor`.

    An expected zero (without a floor) must be met by less than 1e-12.
    """
    assert found.shape == expected.shape, (found.shape, expected.shape)
    expected = expected.double()
    difference = (found.detach().double() - expected).abs().max()
    scale = expected.abs().max().clamp_min(floor)
    if float(scale) == 0:
        return 0.0 if float(difference) < 1e-12 else float("inf")
    return float(difference / scale)


def absolute_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.detach().double() - expected.double()).abs().max())
