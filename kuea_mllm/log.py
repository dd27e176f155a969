"""One logger for the package: readable lines on the terminal, everything in `run.log`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOGGER = logging.getLogger("kuea_mllm")


def configure_terminal(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send the package's log lines to standard error, once."""
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    if not any(getattr(handler, "kuea_terminal", False) for handler in LOGGER.handlers):
        # Written with rich where a terminal reads it, so that lines and progress bars coexist.
        from rich.console import Console
        from rich.logging import RichHandler

        terminal = RichHandler(
            console=Console(stderr=True),
            show_path=False,
            show_time=False,
            show_level=False,
            markup=False,
            highlighter=None,
            keywords=[],
        )
        terminal.kuea_terminal = True  # type: ignore[attr-defined]
        LOGGER.addHandler(terminal)
    # On machines without CUDA it recommends an optional speed-up of 4-bit kernels at every start.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    for handler in LOGGER.handlers:
        if getattr(handler, "kuea_terminal", False):
            handler.setLevel(level)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write all log lines of the block, with time and level, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.DEBUG)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
