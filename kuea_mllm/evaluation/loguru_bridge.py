"""lmms-eval's own log: all of it into a file, its warnings into ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kuea_mllm.log import LOGGER


def import_lmms_eval() -> None:
    """Import lmms-eval (about 20 s the first time), without the warnings of its dependencies."""
    LOGGER.info("Loading lmms-eval.")
    with warnings.catch_warnings():
        # Deprecations inside other packages say nothing about the user's run.
        warnings.simplefilter("ignore")
        import lmms_eval.evaluator  # noqa: F401


@contextmanager
def lmms_log(path: Path) -> Iterator[None]:
    """Write lmms-eval's log of the block to `path`; pass warnings on to our logger.

    lmms-eval logs through loguru, to standard output, where results may be piped from.
    """
    from loguru import logger

    logger.remove()
    sinks = [
        logger.add(path, level="DEBUG", format="{time} {level} {name} {message}", encoding="utf-8"),
        logger.add(_forward, level="WARNING", format="{message}"),
    ]
    try:
        yield
    finally:
        for sink in sinks:
            logger.remove(sink)


def _forward(message: Any) -> None:
    level = logging.ERROR if message.record["level"].no >= logging.ERROR else logging.WARNING
    LOGGER.log(level, "lmms-eval: %s", str(message).strip())
