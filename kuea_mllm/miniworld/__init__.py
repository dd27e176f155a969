"""A small, self-contained world that stands in for the real data and checkpoints.

Where nothing can be downloaded, handwritten digits on coloured textures replace ImageNet, a tiny
CLIP, a tiny DINOv2 and a tiny LLaVA replace the real ones, and four generated lmms-eval tasks
replace the benchmarks. All of them use the real Hugging Face classes and file formats, so every
command of the toolkit runs on them unchanged. What the world can and cannot show is measured in
`docs`; it is no benchmark.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""The checkpoints of seed 0 that ship with the package: `clip/`, `teacher/`, `llava/`."""

__all__ = ["ASSETS"]
