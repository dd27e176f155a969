"""The card of a directory of LoRA weights, written from its `kuea.json` (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kuea_mllm.model_card import (
    CITATION,
    HERE,
    base_id,
    cell,
    details,
    front_matter,
    last_part,
    license_metadata,
    public_record,
    table,
)

_SKIPPED = ("schema_version", "kind", "base_card")
_ROWS = ("rank", "alpha", "dropout", "projector", "train_lm_head")


def render_lora_card(manifest: Mapping[str, Any]) -> str:
    """Return `README.md` for a directory of LoRA weights.

    Args:
        manifest: Content of its `kuea.json`. The card says nothing that it does not, and names no
            path of the machine.
    """
    base = _mapping(manifest, "base")
    base_model = base_id(base)
    name = base_model or last_part(str(base.get("reference") or "the base model"))
    inherited = _mapping(manifest, "base_card")
    licence = license_metadata(inherited, base_model)
    metadata = {
        **licence,
        "library_name": "peft",
        "pipeline_tag": inherited.get("pipeline_tag") or "image-text-to-text",
        "language": inherited.get("language"),
        "base_model": [base_model] if base_model else [],
        "tags": ["kuea", "lora", str(manifest.get("adapter"))],
    }
    sections = [
        front_matter(metadata),
        f"# LoRA weights for {name}",
        f"Low-rank updates of the language model of `{name}`{_projector(manifest)}. The vision "
        "tower is not part of them: they belong to the one that the base holds.",
        "## What was trained\n\n" + _trained(manifest),
        f"## Use\n\n{_use(name)}",
        "## Licence\n\n"
        f"That of the base, `{name}`"
        + (f" ({licence['license']})." if "license" in inherited else "."),
        f"## Citation\n\n{CITATION}",
        details(public_record(_shown(manifest)), _SKIPPED),
    ]
    return "\n\n".join(sections) + "\n"


def _shown(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what only a program compares: the base's settings and hashes."""
    hidden = ("config", "tensors", "dtypes", "vectors", "matrices")
    base = {k: value for k, value in _mapping(manifest, "base").items() if k not in hidden}
    return {**manifest, "base": base}


def _projector(manifest: Mapping[str, Any]) -> str:
    tensors = _mapping(manifest, "tensors")
    return ", and its trained projector or output layer" if tensors.get("whole") else ""


def _trained(manifest: Mapping[str, Any]) -> str:
    lora = _mapping(manifest, "lora") or _mapping(_mapping(manifest, "recipe"), "lora")
    tensors = _mapping(manifest, "tensors")
    rows = [[key, lora[key]] for key in _ROWS if lora.get(key) is not None]
    if tensors:
        rows += [
            ["layers with LoRA", tensors.get("lora_layers")],
            ["parameters of LoRA", tensors.get("lora_parameters")],
            ["parameters trained as a whole", tensors.get("whole_parameters")],
            ["dtype", tensors.get("dtype")],
        ]
    fingerprint = _mapping(manifest, "base").get("vision_tower")
    rows.append(
        ["SHA-256 of the base's vision tower", f"`{fingerprint}`" if fingerprint else "unknown"]
    )
    return table([[cell(entry) for entry in row] for row in rows], ["", "value"])


def _use(name: str) -> str:
    return f"""\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{name}")
model = PeftModel.from_pretrained(base, "{HERE}")
```

As a plain model directory, for programs that do not read PEFT:

```bash
kuea-mllm merge {HERE} MERGED --base path/to/the/base
```"""


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}
