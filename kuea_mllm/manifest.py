"""What is recorded about every result: versions, command, time."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SCHEMA_VERSION = 1

_PACKAGES = (
    "kuea-mllm",
    "torch",
    "transformers",
    "peft",
    "open_clip_torch",
    "accelerate",
    "bitsandbytes",
    "lmms_eval",
    "safetensors",
    "numpy",
    "pillow",
)


def library_versions() -> dict[str, str]:
    """Return the installed versions that can change a number; missing packages are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def current_command() -> str:
    """Return the command line as it was typed, without the folder of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()
