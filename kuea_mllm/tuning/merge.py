"""Merge LoRA weights into their base: a plain model directory, written a tensor at a time.

The base's weight files are copied with other bytes for the tensors that were tuned. Names, dtypes,
order and number of files stay the base's, so whatever loads the base loads the result. Merging goes
into the weights on disk also where the tuning ran on a quantised copy of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kuea_mllm.adapters.base import MLLMAdapter, MLLMTuner, TowerSlot, TuningParts
from kuea_mllm.adapters.lora_directory import LORA, LoraDirectory, open_lora_directory
from kuea_mllm.adapters.named_tower import local_directory
from kuea_mllm.adapters.records import (
    SWAPPED,
    describe_slot,
    read_record,
    tower_fingerprints,
)
from kuea_mllm.adapters.registry import adapter_for, get_adapter, read_model_config
from kuea_mllm.errors import EnvironmentFailure, OutputError, UserError
from kuea_mllm.io import atomic_directory, require_free_output, write_json, write_text
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import SCHEMA_VERSION, library_versions, utc_now
from kuea_mllm.model_card import CARD_FILE, base_card_metadata
from kuea_mllm.model_files import TensorEntry, weight_files
from kuea_mllm.towers.fingerprint import fingerprint_all
from kuea_mllm.towers.model_copy import RECORD_FILE, copy_model
from kuea_mllm.tuning.base_identity import (
    identify_base,
    recorded_identity,
    require_same_base,
    tower_state,
)
from kuea_mllm.tuning.merged_card import render_merged_card
from kuea_mllm.tuning.merged_state import MergedState
from kuea_mllm.tuning.places import is_tied, locate_parts
from kuea_mllm.tuning.proof import prove_merge

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


@dataclass(frozen=True)
class _Plan:
    base: Path
    adapter: MLLMAdapter
    slot: TowerSlot
    lora: LoraDirectory
    state: MergedState
    places: Mapping[str, TensorEntry]
    identity: Mapping[str, Any]
    is_same_base: bool


def merge_adapter(
    base: Path | None,
    adapter: Path,
    out: Path,
    *,
    command: str | None = None,
    link: bool = True,
    mllm: MLLMAdapter | None = None,
    reference: str | None = None,
) -> MergeReceipt:
    """Write the model that LoRA weights and their base are together.

    Each tuned weight is computed in float32, W + scale * B A, and rounded once to the base's dtype.
    Everything else keeps its bytes. The base is not changed.

    Args:
        base: Model directory; None takes the one that the LoRA weights name.
        adapter: Directory of LoRA weights; see `find_lora_directory` for what users give.
        out: Directory to create.
        command: Command line to record.
        link: Whether unchanged weight files may be hard links to the base's.
        mllm: The base's adapter; recognised if absent.
        reference: What to call the LoRA weights in the record; their directory if absent.

    Raises:
        UserError: If the LoRA weights are not plain LoRA, belong to another base, touch the vision
            tower, or `out` exists.
        EnvironmentFailure: If the disk is full, a merged value does not fit the dtype, or the
            result does not read back as computed.
    """
    started = time.monotonic()
    out = Path(out)
    require_free_output(out)
    plan = _plan(base, adapter, mllm)
    if out.resolve().is_relative_to(plan.base.resolve()):
        raise OutputError(f"output {out} lies inside of the base {plan.base}.", "Choose another.")
    with atomic_directory(out) as partial:
        files: dict[str, Any] = {
            **copy_model(plan.base, plan.places, plan.state, partial, link=link)
        }
        checked = prove_merge(plan.base, partial, plan.places, plan.state)
        written = fingerprint_all(tower_state(partial, plan.slot))
        if written["float32"] != plan.identity["vision_tower"]:
            raise EnvironmentFailure(
                f"the vision tower in {out} is not the base's any more.",
                "The disk may be faulty; run the command again.",
            )
        receipt = MergeReceipt(
            **_known(plan),
            **files,
            bytes_written=_size(partial, (*files["files_rewritten"], *files["files_copied"])),
            change=plan.state.change,
            rounding=plan.state.rounding,
            tensors_checked=checked,
            seconds=round(time.monotonic() - started, 3),
        )
        _write_records(plan, receipt, written, command, partial, reference or str(adapter))
    for name in receipt.files_left_out:
        LOGGER.warning("%s was left out of %s: it holds weights that are not loaded", name, out)
    return receipt


def plan_merge(
    base: Path | None, adapter: Path, *, mllm: MLLMAdapter | None = None
) -> MergeReceipt:
    """Make every check of `merge_adapter` and say what it would do; writes nothing.

    Raises:
        UserError: As `merge_adapter`.
    """
    plan = _plan(base, adapter, mllm)
    rewritten = {plan.places[name].file for name in plan.state}
    loaded = weight_files(plan.base)
    return MergeReceipt(
        **_known(plan),
        files_rewritten=tuple(sorted(rewritten)),
        files_linked=tuple(name for name in loaded if name not in rewritten),
        bytes_written=_size(plan.base, rewritten),
    )


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


def _plan(base: Path | None, adapter: Path, mllm: MLLMAdapter | None) -> _Plan:
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
    return _Plan(base, model_adapter, slot, lora, state, used, identity, is_same)


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


def _known(plan: _Plan) -> dict[str, Any]:
    return {
        "adapter": plan.adapter.name,
        "base": str(plan.base),
        "layers_merged": len(plan.lora.pairs),
        "tensors_replaced": len(plan.lora.whole),
        "dtype": plan.state.dtype_names,
        "fingerprint": plan.identity["vision_tower"],
        "is_same_base": plan.is_same_base,
    }


def _size(directory: Path, names: Any) -> int:
    return sum((directory / name).stat().st_size for name in names)


def _write_records(
    plan: _Plan,
    receipt: MergeReceipt,
    written: Mapping[str, str],
    command: str | None,
    partial: Path,
    weights: str,
) -> None:
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
