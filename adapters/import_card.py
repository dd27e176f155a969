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


def render_import_card(record: Mapping[str, Any], *, loader: str) -> str:
    """Return `README.md` for what `MLLMImporter.import_released` wrote.

    Args:
        record: Content of `kuea.json`: `adapter`, `base`, `base_card`, `tower`. The card names no
            path of the machine.
        loader: Class of transformers that loads the model.
    """
    base, tower, inherited = first_base(record), record["tower"], record.get("base_card") or {}
    base_model = base_id(base)
    name = base_model or last_part(str(base["reference"]))
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
        f"```python\nfrom transformers import AutoProcessor, {loader}\n\n"
        f'model = {loader}.from_pretrained("{HERE}")\n'
        f'processor = AutoProcessor.from_pretrained("{HERE}")\n```'
    )
    sections = [
        front_matter(metadata),
        f"# {name} in Hugging Face form",
        f"`{name}`, converted from its authors' layout by kuea-mllm; nothing was trained. The "
        "weights of language model and projector keep their values and dtype; rows that no text "
        "uses were added to its vocabulary.",
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
