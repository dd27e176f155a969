"""Records and files for the tests of tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def record(number: int = 0, image: str | None = "a.png", **changes: Any) -> dict[str, Any]:
    """A sound record in LLaVA's schema."""
    tag = "<image>\n" if image else ""
    made: dict[str, Any] = {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": f"{tag}What is in picture {number}?"},
            {"from": "gpt", "value": f"A cat, {number} times."},
        ],
    }
    if image:
        made["image"] = image
    return {**made, **changes}


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    """Turns that alternate."""
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[n % 2], "value": value} for n, value in enumerate(values)]


def write_list(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def write_image(path: Path, *, size: tuple[int, int] = (6, 4), format: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 90)).save(path, format)
    return path
