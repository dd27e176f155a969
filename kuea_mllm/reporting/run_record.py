"""What the reports of an alignment and of a tuning tell about a run in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kuea_mllm.reporting.blocks import Block, Paragraph
from kuea_mllm.reporting.text import plural


def resumed_note(manifest: Mapping[str, Any], word: str) -> list[Block]:
    """Say where a run was interrupted, if it was; `word` is what its steps are called."""
    resumed = manifest.get("resumed_at")
    if not resumed:
        return []
    steps = ", ".join(f"{step:,}" for step in resumed)
    times = plural(len(resumed), "time")
    return [Paragraph(f"Interrupted and resumed {times}, after {word} {steps}.", "note")]


def versions_text(manifest: Mapping[str, Any], *names: str) -> str:
    """Return the versions of the libraries that a run used, of those that it recorded."""
    versions = manifest["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
