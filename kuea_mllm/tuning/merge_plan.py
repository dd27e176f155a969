"""What a merge is to do: LoRA weights and their base, and whether they belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kuea_mllm.adapters.base import MLLMAdapter, MLLMTuner, TowerSlot, TuningParts
from kuea_mllm.adapters.lora_directory import LORA, LoraDirectory, open_lora_directory
from kuea_mllm.adapters.named_tower import local_directory
from kuea_mllm.adapters.records import read_record, tower_fingerprints
from kuea_mllm.adapters.registry import adapter_for, get_adapter, read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.log import LOGGER
from kuea_mllm.model_files import TensorEntry
from kuea_mllm.towers.files.model_copy import RECORD_FILE
from kuea_mllm.tuning.base_identity import (
    identify_base,
    recorded_identity,
    require_same_base,
)
from kuea_mllm.tuning.merged_state import MergedState
from kuea_mllm.tuning.places import is_tied, locate_parts


@dataclass(frozen=True)
class MergePlan:
    """What is merged into what, every check passed.

    Attributes:
        base: The base's directory.
        adapter: Its adapter.
        slot: Where its tower is.
        lora: What is merged.
        state: The tensors that change.
        places: Where they lie on disk, by their names in the model.
        identity: What the base is recognised by.
        is_same_base: Whether it was compared with the one trained on.
    """

    base: Path
    adapter: MLLMAdapter
    slot: TowerSlot
    lora: LoraDirectory
    state: MergedState
    places: Mapping[str, TensorEntry]
    identity: Mapping[str, Any]
    is_same_base: bool


def make_plan(base: Path | None, adapter: Path, mllm: MLLMAdapter | None) -> MergePlan:
    """Open LoRA weights and their base, and check that they belong together.

    Args:
        base: Model directory; None takes the one that the LoRA weights name.
        adapter: Directory of LoRA weights.
        mllm: The base's adapter; recognised if absent.

    Raises:
        UserError: If they do not, or the LoRA weights are not plain LoRA or touch the tower.
    """
    lora = open_lora_directory(Path(adapter))
    base = find_base(lora) if base is None else Path(base)
    kind = lora.record.get("kind")
    if lora.record and kind != LORA:
        raise UserError(
            f"file {lora.path / RECORD_FILE} is of kind {kind!r}, not of LoRA weights.",
            "It belongs to another directory.",
        )
    model_adapter = mllm or _recorded_adapter(lora, base)
    model_adapter.check_base(base)
    if not isinstance(model_adapter, MLLMTuner):
        raise UserError(f"models of the adapter {model_adapter.name} cannot be tuned or merged.")
    slot = model_adapter.tower_slot(base)
    identity, is_same = _identity(lora, base, slot)
    _require_recorded_tower(base, identity["vision_tower"])
    parts = model_adapter.tuning_parts(base)
    model = model_adapter.build_empty(base)
    places = locate_parts(base, model, parts)
    _require_places(lora, places, parts, model)
    state = MergedState(base, lora, places)
    used = {name: places[name] for name in state}
    return MergePlan(base, model_adapter, slot, lora, state, used, identity, is_same)


def find_base(lora: LoraDirectory) -> Path:
    """Return the base that LoRA weights name, if it is on this machine.

    Raises:
        UserError: If it is not, or they name none.
    """
    stated = lora.record.get("base")
    named = [stated.get("path"), stated.get("reference")] if isinstance(stated, Mapping) else []
    named.append(lora.config.get("base_model_name_or_path"))
    for reference in named:
        if isinstance(reference, str) and reference:
            found = local_directory(reference, with_weights=True)
            if found is not None:
                return found
    wanted = next((name for name in reversed(named) if name), None)
    raise UserError(
        f"{lora.path} was trained on {wanted or 'a base that it does not name'}, which is not on "
        "this machine.",
        "Give its directory with --base.",
    )


def _recorded_adapter(lora: LoraDirectory, base: Path) -> MLLMAdapter:
    """Return the adapter that tuned; a recipe may have named another than recognises the base."""
    recognised = adapter_for(base)
    named = lora.record.get("adapter")
    if named is None or named == recognised.name:
        return recognised
    adapter = get_adapter(str(named))
    if not adapter.recognises(read_model_config(base)):
        raise UserError(
            f"{lora.path} was trained on a model of the adapter {named}, {base} is one of "
            f"{recognised.name}.",
            "Give the base it was trained on with --base.",
        )
    return adapter


def _identity(lora: LoraDirectory, base: Path, slot: TowerSlot) -> tuple[dict[str, Any], bool]:
    identity = recorded_identity(lora.record)
    if identity is not None:
        return require_same_base(identity, base, slot), True
    LOGGER.warning(
        "%s does not say what its base is recognised by, so that %s is only compared by shapes",
        lora.path,
        base,
    )
    return identify_base(base, slot), False


def _require_recorded_tower(base: Path, fingerprint: str) -> None:
    recorded = tower_fingerprints(read_record(base))
    if recorded and fingerprint not in recorded:
        raise UserError(
            f"{base} does not hold the tower that its {RECORD_FILE} records.",
            f"`kuea-mllm verify {base}` tells more.",
        )


def _require_places(
    lora: LoraDirectory,
    places: Mapping[str, TensorEntry],
    parts: TuningParts,
    model: nn.Module,
) -> None:
    head = f"{parts.output_head}."
    for name in (*(f"{layer}.weight" for layer in lora.pairs), *lora.whole):
        if name in places:
            continue
        if name.startswith(f"{parts.vision_tower}."):
            raise UserError(
                f"{lora.path} holds LoRA weights or a copy of {name}, which is part of the vision "
                "tower.",
                "Tuning must leave the tower alone: match only the language model's layers "
                "(`kuea-mllm lora` does). Merge with PEFT if the tower was meant to be tuned.",
            )
        if name.startswith(head) and is_tied(model, parts):
            raise UserError(
                f"{lora.path} holds an output layer ({name}) of its own, but the base ties its "
                "output layer to the embedding, so that its files have no place for another.",
                "Use it unmerged, through PEFT.",
            )
        raise UserError(
            f"{lora.path} changes {name}, which is in neither language model, projector nor output "
            "layer of the base.",
            "It may belong to another model, or name its layers as another release of "
            "transformers does.",
        )
    embedding = f"{parts.language_model}.embed_tokens.weight"
    if embedding in lora.whole and is_tied(model, parts):
        raise UserError(
            f"{lora.path} holds an embedding ({embedding}) of its own, but the base ties its "
            "output layer to it.",
            "Use it unmerged, through PEFT.",
        )
