"""The model card of a tower, written from its `kuea.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from kuea_mllm.model_card import (
    CITATION,
    HERE,
    cell,
    details,
    front_matter,
    hub_id,
    license_metadata,
    public_name,
    public_record,
    table,
)

_MODEL_CLASSES = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
# As measured on held-out images by `align`; what else was measured is in the record.
_MEASURED = {
    "heldout_kernel_gap": "kernel gap to the teacher",
    "heldout_kernel_gap_original": "the same for the original tower, under the present kernel",
    "heldout_cka_teacher": "linear CKA with the teacher",
    "heldout_drift_cosine_mean": "cosine to the original embedding, mean",
    "heldout_drift_bound_mean": "bound on the change of any image-text cosine (Prop. 3.2), mean",
    "heldout_drift_bound_max": "the same, largest",
    "heldout_patch_drift": "relative drift of the patch tokens that LLaVA reads",
    "heldout_zero_shot": "zero-shot accuracy on the held-out images",
}
_TASKS = {
    "transformers": "image-feature-extraction",
    "open_clip": "zero-shot-image-classification",
}
_SKIPPED = ("schema_version", "kind", "fingerprint")


Library = Literal["transformers", "open_clip"]


def render_card(record: Mapping[str, Any], *, library: Library = "transformers") -> str:
    """Return `README.md` for a tower directory.

    Args:
        record: Content of `kuea.json`. The card says nothing that the record does not, and names
            no path of the machine: a Hub id stays, a path becomes its last part.
        library: What loads the directory; an open_clip repository holds a text tower as well.

    Returns:
        Markdown with a YAML front matter that the Hugging Face Hub understands.
    """
    spec = record["spec"]
    base = _base_reference(record)
    base_id = hub_id(base)
    is_aligned = "objective" in record
    metadata = {
        **license_metadata(record, base_id),
        "library_name": library,
        "pipeline_tag": _TASKS[library],
        "base_model": base_id,
        "base_model_relation": "finetune" if base_id and is_aligned else None,
        "tags": ["kuea", spec["family"], "vision-tower"],
    }
    sections = [
        front_matter(metadata),
        f"# {'KUEA-aligned vision tower' if is_aligned else 'Vision tower'}",
        f"A {spec['family'].upper()} vision tower"
        + (f" derived from `{public_name(base)}`" if base else "")
        + f": {spec['layers']} blocks, width {spec['width']}, {spec['image_size']} px, patch "
        f"{spec['patch_size']}, activation {spec['activation']}. Written by kuea-mllm.",
        f"Fingerprint of the vision body: `{record['fingerprint']}` (SHA-256 of all its weights).",
        f"## How it was made\n\n{_origin(record, base)}",
        *_measurements(record),
        f"## Use\n\n{_usage(spec, base_id, library)}",
        f"## Limits\n\n{_limits(is_aligned)}",
        f"## Licence\n\n{_licence(record, base)}",
        *([f"## Citation\n\n{CITATION}"] if is_aligned else []),
        details(public_record(record), _SKIPPED),
    ]
    return "\n\n".join(sections) + "\n"


def _base_reference(record: Mapping[str, Any]) -> str | None:
    base = record.get("base_tower")
    if isinstance(base, Mapping):
        base = base.get("reference")
    return base if isinstance(base, str) else None


def _origin(record: Mapping[str, Any], base: str | None) -> str:
    start = f"`{public_name(base)}`" if base else "another tower"
    if "objective" not in record:
        changes = _changes(record)
        changed = f" Changed on the way: {', '.join(changes)}." if changes else ""
        return (
            f"Converted from {start}; no weight was trained by the program that wrote this card."
            + changed
        )
    teachers = [record.get("teacher"), *(record.get("extra_teachers") or [])]
    names = [
        f"`{public_name(str(teacher['reference']))}`"
        for teacher in teachers
        if isinstance(teacher, Mapping) and "reference" in teacher
    ]
    data = record.get("data")
    count = data.get("trained_on") if isinstance(data, Mapping) else None
    return (
        f"KUEA (Gong et al., ICML 2025) fine-tuned {start} on images alone"
        + (f", {count} of them, for {record['steps']} steps" if count and "steps" in record else "")
        + ": the kernel matrix of its embeddings was drawn towards that of "
        + (" and ".join(names) or "a vision-centric teacher")
        + ", while every embedding was held near the original. The text tower was not touched. "
        "All settings are in the record below." + _afterwards(record)
    )


def _changes(record: Mapping[str, Any]) -> list[str]:
    """Return what a later conversion changed in the weights; "image_size", for instance."""
    conversion = record.get("conversion")
    changes = conversion.get("changes") if isinstance(conversion, Mapping) else None
    return [str(name).replace("_", " ") for name in changes or ()]


def _afterwards(record: Mapping[str, Any]) -> str:
    changes = _changes(record)
    return f" Afterwards a conversion changed the weights: {', '.join(changes)}." if changes else ""


def _measurements(record: Mapping[str, Any]) -> list[str]:
    measured = record.get("heldout")
    if not isinstance(measured, Mapping) or not isinstance(measured.get("after"), Mapping):
        return []
    before, after = measured.get("before") or {}, measured["after"]
    rows = [
        [label, before.get(name, "-"), after[name]]
        for name, label in _MEASURED.items()
        if name in after
    ]
    images = f"\n\nOn {measured['images']} held-out images." if "images" in measured else ""
    # An inherited record tells of the tower before a conversion mixed, resized or rounded it.
    changes = _changes(record)
    shown = table(rows, ["measured", "original", "before the changes" if changes else "this tower"])
    if changes:
        images += (
            f" The conversion ({', '.join(changes)}) came later: these numbers are not those of "
            "the tower as it is."
        )
    return [f"## Drift and measurements\n\n{shown}{images}"]


def _usage(spec: Mapping[str, Any], base_id: str | None, library: Library) -> str:
    loading = _OPEN_CLIP if library == "open_clip" else _TRANSFORMERS
    text_tower = (
        f"\n\nText embeddings of `{base_id}` can be compared with these image embeddings, within "
        "the bound above."
        if base_id and spec["family"] == "clip" and library == "transformers"
        else ""
    )
    code = loading.format(model_class=_MODEL_CLASSES[spec["family"]], here=HERE)
    return f"{code}{text_tower}\n\n{_SWAP.format(here=HERE)}"


_TRANSFORMERS = """\
```python
from transformers import AutoImageProcessor, {model_class}

tower = {model_class}.from_pretrained("{here}")
processor = AutoImageProcessor.from_pretrained("{here}")
```"""

_OPEN_CLIP = """\
```python
import open_clip

# "hf-hub:OWNER/NAME" for a repository of the Hub.
model, preprocess = open_clip.create_model_from_pretrained("local-dir:{here}")
```"""

_SWAP = """\
Into a multimodal LLM, on its files and with proof that it is really in use:

```bash
kuea-mllm swap --base path/to/mllm --tower {here} --out path/to/new
kuea-mllm verify path/to/new --tower {here}
```"""


def _limits(is_aligned: bool) -> str:
    common = (
        "The activation above is part of the tower: with another one it gives other features and "
        "no error. A tower fits only models of the same widths, depth, patch and image size."
    )
    if not is_aligned:
        return common
    return (
        "Only the pooled embedding was held near the original, unless `patch_preserve_weight` in "
        "the record is above zero: a multimodal LLM reads patch tokens, whose drift is measured "
        f"above, so score the swapped model before relying on it. {common}"
    )


def _licence(record: Mapping[str, Any], base: str | None) -> str:
    source = f"`{public_name(base)}`" if base else "the tower they are derived from"
    names = ["teacher", "data"] if "objective" in record else []
    others = f" Terms of the {' and the '.join(names)} may apply as well." if names else ""
    return f"The weights inherit the licence of {source}: {_stated(record)}.{others}"


def _stated(record: Mapping[str, Any]) -> str:
    stated = record.get("license")
    return cell(stated) if stated else "see there"
