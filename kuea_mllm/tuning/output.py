"""Writes what a tuning trained: LoRA weights and projector, with card and record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from kuea_mllm.adapters.lora_directory import (
    LORA,
    describe_tensors,
    open_lora_directory,
    write_lora_directory,
)
from kuea_mllm.errors import EnvironmentFailure
from kuea_mllm.io import atomic_directory
from kuea_mllm.manifest import SCHEMA_VERSION

_ADAPTER = "default"


def save_adapter(
    peft_model: PeftModel,
    directory: Path,
    *,
    manifest: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write LoRA weights, and modules trained as a whole, as PEFT loads them.

    Every tensor is written in the dtype it was trained in (float32), whatever the base's is.

    Args:
        peft_model: The model.
        directory: Directory to create; complete or absent.
        manifest: What to record. `base.reference` becomes `base_model_name_or_path`.
        state: State dict of the model where its own is not whole (a sharded one); its own if
            absent.

    Returns:
        The content of `kuea.json`: the manifest and what was written.

    Raises:
        OutputError: If `directory` exists.
        EnvironmentFailure: If the disk is full, a trained value is not finite, or the files do not
            read back.
    """
    # False: "auto" would ask the Hub about the base's vocabulary.
    found: Mapping[str, Tensor] = get_peft_model_state_dict(
        peft_model, state_dict=state, adapter_name=_ADAPTER, save_embedding_layers=False
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise EnvironmentFailure(
                f"trained tensor {name} holds NaN or infinity; nothing was written to {directory}.",
                "The training diverged: go back to an earlier checkpoint, with a lower rate.",
            )
    base = dict(manifest["base"])
    if "path" not in base and Path(str(base["reference"])).exists():
        # So that a relative path is found from elsewhere, and is never taken for a Hub id.
        base["path"] = str(Path(str(base["reference"])).resolve())
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": LORA,
        **manifest,
        "base": base,
        "tensors": describe_tensors(tensors),
    }
    config = _plain_config(peft_model, str(manifest["base"]["reference"]))
    with atomic_directory(Path(directory)) as partial:
        write_lora_directory(partial, config, tensors, record)
        _read_back(partial, tensors)
    return record


def _read_back(written: Path, tensors: Mapping[str, Tensor]) -> None:
    stored = open_lora_directory(written).tensors
    for name, tensor in tensors.items():
        if not torch.equal(stored[name], tensor):
            raise EnvironmentFailure(
                f"{name} does not read back from {written} as it was written.",
                "The disk may be faulty; write it again.",
            )


def _plain_config(peft_model: PeftModel, reference: str) -> dict[str, Any]:
    """Return `adapter_config.json` as PEFT writes it, but naming the base as the user did."""
    chosen = peft_model.peft_config[_ADAPTER]
    # Sets become lists in a fixed order, so that the same run writes the same file.
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in chosen.to_dict().items()
    }
    if config.get("task_type") is None:
        # As PEFT: so that AutoPeftModel finds the class.
        base = type(peft_model.get_base_model())
        config["auto_mapping"] = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
        }
    return config | {"base_model_name_or_path": reference, "inference_mode": True}
