"""What a merge says about itself: the receipt, and the record and card in the merged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.records import SWAPPED, describe_slot, read_record
from kuea_mllm.io import write_json, write_text
from kuea_mllm.manifest import SCHEMA_VERSION, library_versions, utc_now
from kuea_mllm.model_card import CARD_FILE, base_card_metadata
from kuea_mllm.towers.files.model_copy import RECORD_FILE
from kuea_mllm.tuning.merge_plan import MergePlan
from kuea_mllm.tuning.merged_card import render_merged_card

BASE_CARD_FILE = "README.base.md"


@dataclass(frozen=True)
class MergeReceipt:
    """What a merge did, or would do.

    Attributes:
        adapter: Name of the base's adapter.
        base: The base's directory.
        layers_merged: Layers that became W + scale * B A.
        tensors_replaced: Tensors that were trained as a whole.
        dtype: Of the changed tensors on disk; several are joined by "+".
        fingerprint: Of the vision tower, before and after.
        change: Size of the update, |new - W| / |W|, over all merged layers; None if not written.
        rounding: What the rounding to `dtype` costs, |stored - exact| / |new - W|; None likewise.
        tensors_checked: Tensors read back and compared with W + scale * B A; None likewise.
        is_same_base: Whether the base was compared with the one trained on; false for LoRA weights
            that do not say which that was.
        files_rewritten: Weight files with changed tensors.
        files_linked: Weight files that are hard links to the base's.
        files_copied: Other files.
        files_left_out: Weight files that nothing loads.
        bytes_written: Size of the rewritten and copied files.
        seconds: How long it took.
    """

    adapter: str
    base: str
    layers_merged: int
    tensors_replaced: int
    dtype: str
    fingerprint: str
    is_same_base: bool
    bytes_written: int
    files_rewritten: tuple[str, ...] = ()
    files_linked: tuple[str, ...] = ()
    files_copied: tuple[str, ...] = ()
    files_left_out: tuple[str, ...] = ()
    change: float | None = None
    rounding: float | None = None
    tensors_checked: int | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        content = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in content.items()}


def write_merge_record(
    plan: MergePlan,
    receipt: MergeReceipt,
    written: Mapping[str, str],
    command: str | None,
    partial: Path,
    weights: str,
) -> None:
    """Write `kuea.json` and the model card of a merged model.

    Args:
        plan: What was merged.
        receipt: What that did.
        written: Fingerprints of the tower in the result, by dtype.
        command: Command line to record.
        partial: The result's directory, with the copy of the base's card.
        weights: What to call the LoRA weights.
    """
    record = read_record(plan.base)
    stated = plan.lora.record.get("base")
    reference = stated.get("reference") if isinstance(stated, Mapping) else None
    reference = str(reference or plan.base)
    history = record.pop("history", [])
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": SWAPPED,
        "adapter": plan.adapter.name,
        "base": {"reference": reference, "path": str(plan.base.resolve())},
        # Which tower is inside, and which it took the place of, is as the base says.
        "tower": record.get("tower")
        or {
            "source": reference,
            "layout": "mllm_directory",
            "fingerprint": written["float32"],
            "fingerprints": dict(written),
            "manifest": None,
        },
        **({"replaced": record["replaced"]} if "replaced" in record else {}),
        "tuned": {
            "weights": weights,
            "record": {**plan.lora.record},
            **{k: v for k, v in receipt.to_dict().items() if k not in ("adapter", "base")},
            "arithmetic": f"W + scale * B A in float32, rounded once to {receipt.dtype}",
        },
        "slot": describe_slot(plan.slot),
        "base_card": record.get("base_card") or base_card_metadata(plan.base),
        "versions": library_versions(),
        "created": utc_now(),
        "command": command,
        "history": [*history, record] if record else [],
    }
    write_json(partial / RECORD_FILE, manifest)
    card = partial / CARD_FILE
    if card.exists():
        # The base's own card says things that are no longer true of the copy; one that we wrote
        # stands for a record that is kept in the history.
        if record.get("kind") == SWAPPED:
            card.unlink()
        else:
            card.replace(partial / BASE_CARD_FILE)
    write_text(card, render_merged_card(manifest))
