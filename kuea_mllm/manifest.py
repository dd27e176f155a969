"""What is recorded about every result: versions, command, time."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1

# What stands before a file of weights for a model of timm, see `teachers.load`.
_TIMM_FILE = re.compile(r"timm:[^@]+@")

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


def named_source(reference: str) -> dict[str, str]:
    """Return what a record says about where a model was read from.

    Args:
        reference: As it was typed: a path, a Hub id, or `timm:NAME@FILE`.

    Returns:
        `reference`, and `path` where it is a file or directory here: the same from any folder.
        Cards and uploads leave entries of that name out.
    """
    prefix, path = _parted(reference)
    if not path.exists():
        return {"reference": reference}
    return {"reference": reference, "path": f"{prefix}{path.absolute()}"}


def recorded_source(entry: Mapping[str, Any]) -> str:
    """Return what opens the model that `named_source` was written about.

    Args:
        entry: Part of a record; older ones have no `path`, and a relative `reference`.

    Returns:
        The path as it was. Only if nothing lies there, and something does under the name as it was
        typed, that one: folders that were moved together still find each other.
    """
    reference, path = str(entry["reference"]), entry.get("path")
    if not isinstance(path, str):
        return reference
    is_moved = not _parted(path)[1].exists() and _parted(reference)[1].exists()
    return reference if is_moved else path


def _parted(source: str) -> tuple[str, Path]:
    """Part a source into what stands before a file's name, if anything does, and the name."""
    found = _TIMM_FILE.match(source)
    prefix = found.group() if found else ""
    return prefix, Path(source[len(prefix) :])
