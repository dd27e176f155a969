"""The model card of an MLLM whose tower was swapped, written from its `kuea.json`."""

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
    hub_id,
    last_part,
    license_metadata,
    public_name,
    public_record,
    table,
)

_SKIPPED = ("schema_version", "kind", "compatibility", "base_card")
_USE = f"""\
Loads wherever the base loads: the same classes, the same files.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{HERE}")
processor = AutoProcessor.from_pretrained("{HERE}")
```

Proof that the tower named above is the one inside:

```bash
kuea-mllm verify path/to/a/local/copy
```"""

_LIMITS = """\
Nothing but the tower was changed: neither projector nor language model was tuned to it, unless the
record says so. How well the result answers is for an evaluation to say, not for this card."""


def render_mllm_card(manifest: Mapping[str, Any]) -> str:
    """Return `README.md` for a directory that `swap` wrote.

    Args:
        manifest: Content of `kuea.json`. The card says nothing that it does not, and names no
            path of the machine.

    Returns:
        Markdown with a YAML front matter that the Hugging Face Hub understands.
    """
    base, tower = first_base(manifest), _mapping(manifest, "tower")
    inherited = _mapping(manifest, "base_card")
    base_model = base_id(base)
    base_name = base_model or last_part(str(base.get("reference") or "the base model"))
    tower_name = public_name(str(tower.get("source") or "another tower"))
    models = [base_model, hub_id(tower.get("source"))]
    licence = license_metadata(inherited, base_model)
    metadata = {
        **licence,
        "library_name": "transformers",
        "pipeline_tag": inherited.get("pipeline_tag") or "image-text-to-text",
        "language": inherited.get("language"),
        "base_model": [model for model in models if model],
        "tags": ["kuea", "vision-tower-swapped", str(manifest.get("adapter"))],
    }
    sections = [
        front_matter(metadata),
        f"# {base_name} with another vision tower",
        f"`{base_name}`, unchanged but for its vision tower, which is {_tower_in_words(tower)}. "
        "The weights of language model and projector are those of the base, bit for bit. Written "
        "by kuea-mllm.",
        f"## Which tower is inside\n\n{_fingerprints(manifest)}",
        *_compatibility(manifest),
        f"## Use\n\n{_USE}",
        f"## Limits\n\n{_LIMITS}",
        "## Licence\n\n"
        f"That of the base, `{base_name}`"
        + (f" ({licence['license']})" if "license" in inherited else "")
        + f", and of the tower, `{tower_name}`; where they differ, the stricter one binds.",
        f"## Citation\n\n{CITATION}",
        details(public_record(manifest), _SKIPPED),
    ]
    return "\n\n".join(sections) + "\n"


def _tower_in_words(tower: Mapping[str, Any]) -> str:
    name = f"`{public_name(str(tower.get('source') or 'another tower'))}`"
    mix = _mapping(tower, "mix")
    if not mix:
        return name
    return f"a mix of {name} (weight {mix.get('weight')}) and {mix.get('rest')} (the remainder)"


def _fingerprints(manifest: Mapping[str, Any]) -> str:
    tower, replaced = _mapping(manifest, "tower"), _mapping(manifest, "replaced")
    rows = [
        ["tower now", f"`{replaced.get('fingerprint_after', '-')}`"],
        ["the base's own", f"`{replaced.get('fingerprint_before') or 'not known'}`"],
        ["as the tower was given", f"`{tower.get('fingerprint', '-')}`"],
        ["dtype", replaced.get("dtype", "-")],
        ["tensors replaced", replaced.get("tensors", "-")],
    ]
    return (
        table(rows, ["vision tower", "SHA-256 of its weights"]) + "\n\nThe first and the third "
        "differ where the base's dtype rounds the tower's weights."
    )


def _compatibility(manifest: Mapping[str, Any]) -> list[str]:
    report = manifest.get("compatibility")
    if not isinstance(report, Mapping):
        return []
    rows = [
        [
            check.get("name"),
            check.get("base"),
            check.get("tower"),
            f"{check.get('verdict')}{' (forced)' if check.get('forced') else ''}",
        ]
        for check in report.get("checks") or []
    ]
    sections = [
        "## Compatibility\n\n" + table(rows, ["check", "base asks for", "tower is", "verdict"])
    ]
    warnings = [
        f"- {check['name']}: {check['remedy']}"
        for check in report.get("checks") or []
        if check.get("verdict") == "warn" and check.get("remedy")
    ]
    if warnings:
        sections.append("Warnings:\n\n" + "\n".join(public_record(warnings)))
    lineage, drift = report.get("lineage"), report.get("drift")
    if isinstance(lineage, Mapping):
        sections.append(f"Lineage: {lineage.get('relation')}. {lineage.get('evidence', '')}")
    if isinstance(drift, Mapping):
        numbers = {k: v for k, v in drift.items() if isinstance(v, int | float)}
        numbers |= {f"embedding {k}": v for k, v in (drift.get("embedding") or {}).items()}
        shown = [[name.replace("_", " "), value] for name, value in numbers.items()]
        where = f"Drift from the base's own tower, at the tokens it reads ({drift.get('tap')})"
        sections.append(f"{where}:\n\n" + table(shown, ["drift", "value"]))
    return [public_record(section) for section in sections]


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}
