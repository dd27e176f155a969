"""The model card of a merged model, written from its `kuea.json` (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kuea_mllm.model_card import (
    CITATION,
    HERE,
    base_id,
    details,
    first_base,
    front_matter,
    last_part,
    license_metadata,
    public_name,
    public_record,
    table,
)

_SKIPPED = ("schema_version", "kind", "base_card", "history")


def render_merged_card(manifest: Mapping[str, Any]) -> str:
    """Return `README.md` for a directory that `merge` wrote.

    Args:
        manifest: Content of `kuea.json`. The card says nothing that it does not, and names no path
            of the machine.
    """
    base, tuned = first_base(manifest), _mapping(manifest, "tuned")
    tower, inherited = _mapping(manifest, "tower"), _mapping(manifest, "base_card")
    base_model = base_id(base)
    name = base_model or last_part(str(base.get("reference") or "the base model"))
    licence = license_metadata(inherited, base_model)
    metadata = {
        **licence,
        "library_name": "transformers",
        "pipeline_tag": inherited.get("pipeline_tag") or "image-text-to-text",
        "language": inherited.get("language"),
        "base_model": [base_model] if base_model else [],
        "tags": ["kuea", "merged-lora", str(manifest.get("adapter"))],
    }
    sections = [
        front_matter(metadata),
        f"# {name}, tuned",
        f"`{name}` with LoRA weights merged into its language model. Names, dtypes and files of "
        "the weights are those of the base, so that it loads wherever the base does. Written by "
        "kuea-mllm.",
        f"## What was tuned\n\n{_tuned(tuned)}",
        "## Which tower is inside\n\n"
        f"`{public_name(str(tower.get('source') or 'the tower of the base'))}`, SHA-256 of its "
        f"weights `{tuned.get('fingerprint', '-')}`; the tuning left it as it was. "
        "`kuea-mllm verify path/to/a/local/copy` computes it again.",
        f"## Use\n\n{_use()}",
        f"## Licence\n\nThat of the base, `{name}`"
        + (f" ({licence['license']})" if "license" in inherited else "")
        + ", and of what it was tuned on.",
        f"## Citation\n\n{CITATION}",
        details(public_record({**manifest, "tuned": _without_record(tuned)}), _SKIPPED),
    ]
    return "\n\n".join(sections) + "\n"


def _without_record(tuned: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tuned.items() if key != "record"}


def _tuned(tuned: Mapping[str, Any]) -> str:
    rows = [
        ["layers merged", tuned.get("layers_merged")],
        ["tensors trained as a whole", tuned.get("tensors_replaced")],
        ["arithmetic", tuned.get("arithmetic")],
        ["size of the update, relative to the weights", tuned.get("change")],
        ["cost of the rounding, relative to the update", tuned.get("rounding")],
        ["tensors read back and compared", tuned.get("tensors_checked")],
    ]
    return table([row for row in rows if row[1] is not None], ["", "value"])


def _use() -> str:
    return f"""\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{HERE}")
processor = AutoProcessor.from_pretrained("{HERE}")
```"""


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}
