"""The model card of an MLLM that was converted from its authors' layout (no torch)."""

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
)

_SKIPPED = ("schema_version", "kind", "base_card")
_LLAVA_CHANGES = (
    "The weights of language model and projector keep their values and dtype; rows that no text "
    "uses were added to its vocabulary."
)


def render_import_card(
    record: Mapping[str, Any],
    *,
    loader: str,
    loader_module: str = "transformers",
    processor: str = "AutoProcessor",
    processor_module: str = "transformers",
    changes: str = _LLAVA_CHANGES,
    fallback_name: str | None = None,
) -> str:
    """Return `README.md` for what `MLLMImporter.import_released` wrote.

    Args:
        record: Content of `kuea.json`: `adapter`, `base`, `base_card`, `tower`. The card names no
            path of the machine.
        loader: Class that loads the model.
        loader_module: Where it is imported from.
        processor: Class that loads its processor.
        processor_module: Where it is imported from.
        changes: What became of the weights, in a sentence.
        fallback_name: What to call the model if its base has no Hub id; by default the last part of
            its path.
    """
    base, tower, inherited = first_base(record), record["tower"], record.get("base_card") or {}
    base_model = base_id(base)
    name = base_model or fallback_name or last_part(str(base["reference"]))
    licence = license_metadata(inherited, base_model)
    metadata = {
        **licence,
        "library_name": "transformers",
        "pipeline_tag": inherited.get("pipeline_tag") or "image-text-to-text",
        "language": inherited.get("language"),
        "base_model": [base_model] if base_model else [],
        "tags": ["kuea", "converted", str(record["adapter"])],
    }
    use = (
        f"```python\n{_imports(processor, processor_module, loader, loader_module)}\n\n"
        f'model = {loader}.from_pretrained("{HERE}")\n'
        f'processor = {processor}.from_pretrained("{HERE}")\n```'
    )
    sections = [
        front_matter(metadata),
        f"# {name} in Hugging Face form",
        f"`{name}`, converted from its authors' layout by kuea-mllm; nothing was trained. "
        f"{changes}",
        "## Which tower is inside\n\n"
        f"`{public_name(str(tower['source']))}`, SHA-256 of its weights `{tower['fingerprint']}`. "
        "`kuea-mllm verify path/to/a/local/copy` computes it again.",
        f"## Use\n\n{use}",
        f"## Licence\n\nThat of `{name}`"
        + (f" ({licence['license']})." if "license" in inherited else "."),
        f"## Citation\n\n{CITATION}",
        details(public_record(record), _SKIPPED),
    ]
    return "\n\n".join(sections) + "\n"


def _imports(processor: str, processor_module: str, loader: str, loader_module: str) -> str:
    if processor_module == loader_module:
        return f"from {loader_module} import {', '.join(sorted((processor, loader)))}"
    pairs = sorted([(loader_module, loader), (processor_module, processor)])
    return "\n".join(f"from {module} import {name}" for module, name in pairs)
