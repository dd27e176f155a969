"""Fixtures of the golden tests; the helpers behind them are in `golden_files`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import GoldenFile, align_index, golden_root

# A set may hold only some of the groups; what it lacks is left out, and the header says so.
_LACKING = [
    group for group in ("align", "llava", "openflamingo") if not (golden_root() / group).is_dir()
]
collect_ignore_glob = [f"test_{group}_*.py" for group in _LACKING]


def pytest_report_header() -> list[str]:
    return [f"golden set {golden_root()} holds no {group}/" for group in _LACKING]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The directory that holds the golden sets; `KUEA_GOLDEN_DIR` or `tests/golden`."""
    return golden_root()


@pytest.fixture(scope="session")
def golden_index() -> dict[str, Any]:
    """The index of the alignment goldens."""
    return align_index()


@pytest.fixture(scope="session")
def align_golden() -> Callable[[str], GoldenFile]:
    """Open a file of `align/`: `align_golden("schedule.safetensors")["small.f_value"]`."""
    return GoldenFile
