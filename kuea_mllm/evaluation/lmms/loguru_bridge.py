"""lmms-eval's own log: all of it into a file, its warnings into ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kuea_mllm.log import LOGGER

# About the format of lmms-eval's own task files: nobody who runs them can do anything about it.
_ONLY_LOGGED = ("A task YAML file was found to contain a `group` key.",)


def import_lmms_eval() -> None:
    """Import lmms-eval (about 20 s the first time), without the warnings of its dependencies."""
    LOGGER.info("Loading lmms-eval.")
    with warnings.catch_warnings():
        # Deprecations inside other packages say nothing about the user's run.
        warnings.simplefilter("ignore")
        import lmms_eval.evaluator  # noqa: F401


@contextmanager
def lmms_log(path: Path) -> Iterator[None]:
    """Write lmms-eval's log of the block to `path`; pass warnings on to our logger, each once.

    lmms-eval logs through loguru, to standard output, where results may be piped from.
    """
    from loguru import logger

    logger.remove()
    sinks = [
        logger.add(path, level="DEBUG", format="{time} {level} {name} {message}", encoding="utf-8"),
        logger.add(_Forwarder(), level="WARNING", format="{message}"),
    ]
    try:
        yield
    finally:
        for sink in sinks:
            logger.remove(sink)


class _Forwarder:
    """Hands messages to our logger: errors all of them, a warning when it is new."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: Any) -> None:
        """Take one message; called by loguru."""
        text = str(message).strip()
        if message.record["level"].no >= logging.ERROR:
            LOGGER.error("lmms-eval: %s", text)
        elif text not in self._said and not text.startswith(_ONLY_LOGGED):
            self._said.add(text)
            LOGGER.warning("lmms-eval: %s", text)
