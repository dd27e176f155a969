"""The model card of a tower, written from its `kuea.json` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_SKIPPED = ("schema_version", "spec", "fingerprint")


def render_card(record: Mapping[str, Any]) -> str:
    """Return `README.md` for a tower directory.

    Args:
        record: Content of `kuea.json`; every entry becomes a section or a table row, so the card
            cannot say anything that the record does not.

    Returns:
        Markdown with a YAML front matter that the Hugging Face Hub understands.
    """
    spec = record["spec"]
    base = _base_reference(record)
    front = ["---", "library_name: transformers", "pipeline_tag: image-feature-extraction"]
    if base and not base.startswith((".", "/", "~")) and base.count("/") == 1:
        # json.dumps: a JSON string is a YAML string, whatever it contains.
        front.append(f"base_model: {json.dumps(base)}")
    front += ["tags:", "- kuea", f"- {spec['family']}", "- vision-tower", "---"]
    model_class = (
        "CLIPVisionModelWithProjection" if spec["family"] == "clip" else "SiglipVisionModel"
    )
    sections = [
        "\n".join(front),
        f"# {'KUEA-aligned vision tower' if 'objective' in record else 'Vision tower'}",
        f"A {spec['family'].upper()} vision tower"
        + (f" derived from `{base}`" if base else "")
        + f": {spec['layers']} blocks, width {spec['width']}, {spec['image_size']} px, patch "
        f"{spec['patch_size']}, activation {spec['activation']}. Written by kuea-mllm.",
        "```python\n"
        f"from transformers import AutoImageProcessor, {model_class}\n\n"
        f'tower = {model_class}.from_pretrained("path/to/this/directory")\n'
        'processor = AutoImageProcessor.from_pretrained("path/to/this/directory")\n'
        "```",
        f"Fingerprint of the vision body: `{record['fingerprint']}`",
    ]
    for key, value in record.items():
        if key not in _SKIPPED:
            sections.append(f"## {key.replace('_', ' ').capitalize()}\n\n{_render(value)}")
    return "\n\n".join(sections) + "\n"


def _base_reference(record: Mapping[str, Any]) -> str | None:
    base = record.get("base_tower")
    if isinstance(base, Mapping):
        base = base.get("reference")
    return base if isinstance(base, str) else None


def _render(value: object) -> str:
    if isinstance(value, Mapping) and value:
        rows = [f"| {_cell(k)} | {_cell(v)} |" for k, v in value.items()]
        return "\n".join(["| | |", "|---|---|", *rows])
    return _cell(value)


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")
