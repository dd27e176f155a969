"""What a finished tuning says about itself in `kuea.json`."""

from __future__ import annotations

from typing import Any

from kuea_mllm.adapters.records import read_record
from kuea_mllm.manifest import SCHEMA_VERSION, current_command, library_versions, utc_now
from kuea_mllm.model_card import base_card_metadata
from kuea_mllm.tuning.inputs import TuningInputs
from kuea_mllm.tuning.receipt import TrainingReceipt


def describe_tuning(
    inputs: TuningInputs,
    receipt: TrainingReceipt,
    *,
    tower_fingerprint: str,
    steps: int,
    data_counts: dict[str, int],
    **more: Any,
) -> dict[str, Any]:
    """Return the manifest of an adapter directory.

    Args:
        inputs: What was read.
        receipt: What was trained.
        tower_fingerprint: Of the tower in the model, before and after.
        steps: Updates.
        data_counts: What was cut off.
        more: Further entries: processes, seconds, resumptions.
    """
    recipe = inputs.recipe
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "lora",
        "adapter": inputs.adapter.name,
        "base": {"reference": str(recipe.model.path), **inputs.identity},
        "vision_tower": {"fingerprint": tower_fingerprint, "dtype": recipe.runtime.dtype},
        "base_card": read_record(inputs.base).get("base_card") or base_card_metadata(inputs.base),
        "compat": recipe.compat,
        "quantization": recipe.model.quantization,
        "lora": recipe.lora.model_dump(mode="json"),
        "optim": recipe.optim.model_dump(mode="json"),
        "runtime": recipe.runtime.model_dump(mode="json"),
        "trained": receipt.to_dict(),
        "data": {
            "file": str(recipe.data.file),
            "listing": inputs.mixture.folder.name,
            "records": len(inputs.mixture),
            "max_length": recipe.data.max_length,
            "cut_after_splicing": recipe.data.cut_after_splicing,
            "packing": recipe.data.packing,
            "group_by_modality": recipe.data.group_by_modality,
            "order": recipe.data.order,
            "skipped_records": recipe.data.skip_records,
            **data_counts,
        },
        "steps": steps,
        **more,
        "versions": library_versions(),
        "command": current_command(),
        "created": utc_now(),
    }
