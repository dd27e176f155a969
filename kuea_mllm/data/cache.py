"""Where things lie that can be computed again: $KUEA_MLLM_CACHE, else beside the hub's cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of caches, which may not exist yet.

    $KUEA_MLLM_CACHE if it is set, else `kuea_mllm` below $HF_HOME, else below ~/.cache/huggingface.
    """
    own = os.environ.get("KUEA_MLLM_CACHE")
    if own:
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface")
    return Path(home).expanduser() / "kuea_mllm"


def mark_used(path: Path) -> None:
    """Give a file the present time, by which `kuea-mllm cache` tells when a thing was used.

    A cache that several people share may belong to another of them; then its age is not known.
    """
    with contextlib.suppress(PermissionError):
        os.utime(path)
