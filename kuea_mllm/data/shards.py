"""Names of shards: brace patterns, wildcards, folders."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from kuea_mllm.errors import DataError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 1_000_000


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..127}` and `{train,val}`, left to right; other text stays as it is.

    Raises:
        DataError: If a brace is not closed or stands for too many names.
    """
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    end = pattern.find("}", start)
    if end < 0 or "{" in pattern[start + 1 : end]:
        raise DataError(f"shard pattern {pattern} has braces that are not closed or are nested.")
    head, inner, tail = pattern[:start], pattern[start + 1 : end], pattern[end + 1 :]
    span = _RANGE.fullmatch(inner)
    if span:
        first, last = span.group(1), span.group(2)
        width = len(first) if first.startswith("0") else 0
        if int(last) < int(first) or int(last) - int(first) >= _MOST_SHARDS:
            raise DataError(f"shard pattern {pattern}: {{{inner}}} is not an ascending range.")
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise DataError(f"shard pattern {pattern}: {{{inner}}} is neither a..b nor a list.")
    tails = expand_braces(tail)
    return [f"{head}{choice}{rest}" for choice in choices for rest in tails]


def list_shards(images: str, suffix: str) -> list[str]:
    """Return local files: a file, all in a folder, a brace pattern or a wildcard.

    Args:
        images: What to look for.
        suffix: What the files of a folder must end with, such as ".tar".

    Raises:
        DataError: If there is none, or one of a brace pattern is missing.
    """
    path = Path(images)
    if path.is_dir():
        found = sorted(str(each) for each in path.rglob(f"*{suffix}") if each.is_file())
        if not found:
            raise DataError(f"folder {images} holds no *{suffix} file.")
        return found
    if path.exists():
        return [images]
    names: list[str] = []
    for name in expand_braces(images):
        if glob.has_magic(name) and not Path(name).exists():
            matched = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 - absolute ones too
            if not matched:
                raise DataError(f"no file matches {name}.")
            names += matched
        else:
            names.append(name)
    missing = [name for name in names if not Path(name).exists()]
    if missing:
        raise DataError(
            f"file {missing[0]} does not exist ({len(missing)} of {len(names)} of {images})."
        )
    return names
