"""Puts a vision tower in the place of the one an MLLM was trained with, and proves it.

On disk, only the bytes of the tower's tensors change: a shard that holds some of them is copied and
overwritten in place, so that its header, every other tensor and the key names stay exactly those of
the base. All checks come before the first byte is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.base import MLLMAdapter, TowerSlot
from kuea_mllm.errors import EnvironmentFailure, OutputError, UserError
from kuea_mllm.io import atomic_directory, read_json, require_free_output, write_json
from kuea_mllm.manifest import SCHEMA_VERSION, library_versions, utc_now
from kuea_mllm.swapping.files import MANIFEST_FILE, locate_tower, write_files
from kuea_mllm.swapping.fit import check_fit, fitted_state, require_change
from kuea_mllm.towers import keys
from kuea_mllm.towers.fingerprint import fingerprint_all, fingerprint_state
from kuea_mllm.towers.tower import Tower

LOGGER = logging.getLogger("kuea_mllm")

__all__ = ["SwapReceipt", "swap_tower", "swap_tower_files", "tower_fingerprint_of"]


@dataclass(frozen=True)
class SwapReceipt:
    """What a swap did.

    Attributes:
        adapter: Name of the adapter that was used.
        fingerprint_before: Fingerprint of the tower that the base held.
        fingerprint_after: Fingerprint of the tower as it is now, in the base's dtype.
        tensors_replaced: Number of tensors that were overwritten.
        key_prefix: What stands before the tower's tensor names.
        dtype: Dtype of the replaced tensors; several are joined by "+".
        seconds: Time the swap took.
        files_rewritten: Weight files that hold tensors of the tower.
        files_linked: Weight files that are hard links to those of the base.
        files_copied: All other files taken over.
        files_left_out: Weight files of the base that no loader would read, and that would
            still hold the old tower.
    """

    adapter: str
    fingerprint_before: str
    fingerprint_after: str
    tensors_replaced: int
    key_prefix: str
    dtype: str
    seconds: float
    files_rewritten: tuple[str, ...] = ()
    files_linked: tuple[str, ...] = ()
    files_copied: tuple[str, ...] = ()
    files_left_out: tuple[str, ...] = ()


def swap_tower_files(
    base: Path,
    tower: Tower,
    out: Path,
    *,
    adapter: MLLMAdapter,
    command: str | None = None,
    allow_same: bool = False,
    reference: str | None = None,
) -> SwapReceipt:
    """Write a copy of a model directory that holds another vision tower.

    The base is never modified. Weight files without tensors of the tower are hard-linked where the
    file system allows it and copied elsewhere; small files are always copied, so that editing
    them later cannot reach the base.

    Args:
        base: Complete model directory, weights in safetensors.
        tower: The tower to put in.
        out: Directory to create.
        adapter: The base's adapter.
        command: Command line to record.
        allow_same: Accept a tower that the base holds already.
        reference: How the user named the base (a hub id, say); the path if absent.

    Raises:
        TowerMismatch: If the tower does not fit, or is the one that the base holds already.
        UserError: If the base is incomplete or `out` exists.
        EnvironmentFailure: If the disk is full or the written files do not read back.
    """
    started = time.monotonic()
    base, out = Path(base), Path(out)
    require_free_output(out)
    if out.resolve().is_relative_to(base.resolve()):
        raise OutputError(f"output {out} lies inside of the base {base}.", "Choose another --out.")
    adapter.check_base(base)
    slot = adapter.tower_slot(base)
    checks = check_fit(slot, tower.spec, str(base))
    history = _history(base)
    place = locate_tower(base, slot)
    new_state = fitted_state(tower, place.entries, str(base))
    before, after = fingerprint_state(place.state()), fingerprint_state(new_state)
    require_change(before, after, tower, str(base), allow_same=allow_same)
    with atomic_directory(out) as partial:
        receipt = SwapReceipt(
            adapter=adapter.name,
            fingerprint_before=before,
            fingerprint_after=after,
            tensors_replaced=len(new_state),
            key_prefix=place.prefix,
            dtype=_dtype_names(new_state),
            seconds=0.0,
            **write_files(place, new_state, partial),
        )
        written = fingerprint_all(place.state(partial))
        if written["float32"] != after:
            raise EnvironmentFailure(
                f"the tower written to {out} does not read back as it was meant to be.",
                "The disk may be faulty; run the command again.",
            )
        receipt = replace(receipt, seconds=round(time.monotonic() - started, 3))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": "mllm",
            "adapter": adapter.name,
            "base": {"reference": reference or str(base), "path": str(base.resolve())},
            "tower": _tower_record(tower, written),
            "replaced": _replaced_record(receipt),
            "tap": {"layer": slot.tap_layer, "drops_cls": slot.drops_cls},
            "compatibility": checks,
            "versions": library_versions(),
            "created": utc_now(),
            "command": command,
            "seconds": receipt.seconds,
            "history": history,
        }
        write_json(partial / MANIFEST_FILE, manifest)
    for name in receipt.files_left_out:
        LOGGER.warning("%s was left out of %s: it holds weights that are not loaded", name, out)
    return receipt


def swap_tower(
    model: nn.Module, tower: Tower, adapter: MLLMAdapter, *, allow_same: bool = False
) -> SwapReceipt:
    """Replace the vision tower of a loaded model in place, in the model's dtype and on its device.

    Raises:
        TowerMismatch: If the tower does not fit, or is the one that the model holds already; the
            model is unchanged then.
        UserError: If the model is not of the adapter's kind.
    """
    started = time.monotonic()
    module: Any = adapter.vision_module(model)
    where = f"a loaded {type(model).__name__}"
    if not hasattr(module, "config"):
        raise UserError(f"the vision tower of {where} has no transformers configuration.")
    vision_config = module.config.to_dict()
    family = "siglip" if "siglip" in str(vision_config.get("model_type")) else "clip"
    slot = TowerSlot(vision_config, ("",), tap_layer=-1, drops_cls=False, family=family)
    check_fit(slot, tower.spec, where)
    targets = {
        name.removeprefix(keys.HF_PREFIX): tensor
        for name, tensor in module.state_dict().items()
        if not name.endswith(keys.IGNORED_SUFFIX)
    }
    new_state = fitted_state(tower, targets, where)
    before, after = fingerprint_state(targets), fingerprint_state(new_state)
    require_change(before, after, tower, where, allow_same=allow_same)
    with torch.no_grad():
        for name, tensor in new_state.items():
            targets[name].copy_(tensor)
    return SwapReceipt(
        adapter=adapter.name,
        fingerprint_before=before,
        fingerprint_after=fingerprint_state(module.state_dict()),
        tensors_replaced=len(new_state),
        key_prefix="",
        dtype=_dtype_names(new_state),
        seconds=round(time.monotonic() - started, 3),
    )


def tower_fingerprint_of(model_dir: Path, adapter: MLLMAdapter) -> str:
    """Return the fingerprint of the tower in a model directory; reads only the tower's tensors.

    Raises:
        UserError: If the directory is not readable as a model of this adapter.
    """
    model_dir = Path(model_dir)
    return fingerprint_state(locate_tower(model_dir, adapter.tower_slot(model_dir)).state())


def _dtype_names(state: Mapping[str, Tensor]) -> str:
    return "+".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()}))


def _tower_record(tower: Tower, written: Mapping[str, str]) -> dict[str, Any]:
    return {
        "source": tower.source,
        "layout": tower.layout,
        "fingerprint": tower.fingerprint,
        # Of the tensors as written, so that a runtime in any dtype can be compared with them.
        "fingerprints": dict(written),
        "spec": tower.spec.to_dict(),
        "manifest": tower.manifest,
    }


def _replaced_record(receipt: SwapReceipt) -> dict[str, Any]:
    return {
        "fingerprint_before": receipt.fingerprint_before,
        "fingerprint_after": receipt.fingerprint_after,
        "tensors": receipt.tensors_replaced,
        "key_prefix": receipt.key_prefix,
        "dtype": receipt.dtype,
        "files": list(receipt.files_rewritten),
        "files_left_out": list(receipt.files_left_out),
    }


def _history(base: Path) -> list[Any]:
    """Return the base's own manifests, oldest first, each without its history."""
    if not (base / MANIFEST_FILE).is_file():
        return []
    previous = read_json(base / MANIFEST_FILE)
    if not isinstance(previous, dict):
        return []
    earlier = previous.pop("history", [])
    return [*(earlier if isinstance(earlier, list) else []), previous]
