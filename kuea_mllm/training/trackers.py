"""Trackers a run may report to besides its `metrics.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from kuea_mllm.errors import UserError

_TRACKERS = {"tensorboard": "kuea-mllm[tensorboard]", "wandb": "wandb"}


def require_trackers(names: Sequence[str]) -> None:
    """Check that what `runtime.trackers` names is installed.

    Raises:
        UserError: If something is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"key 'runtime.trackers' names {name}, which is not installed.",
                f"Install it: pip install '{_TRACKERS[name]}'.",
            )


@contextmanager
def tensorboard_in(directory: Path) -> Iterator[None]:
    """Have a tensorboard callback that is made in the block write to the run directory."""
    variable = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(variable)
    os.environ[variable] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
