"""Write a copy of a model directory that holds another vision tower.

On disk, only the bytes of the tower's tensors change. All checks come before the first byte is
written, and the result has its final name only when it is complete and reads back as it should.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.adapters.base import MLLMAdapter
from kuea_mllm.adapters.records import SWAPPED, describe_slot, read_record
from kuea_mllm.errors import EnvironmentFailure, OutputError, TowerMismatch, UserError
from kuea_mllm.io import atomic_directory, require_free_output, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import SCHEMA_VERSION, library_versions, utc_now
from kuea_mllm.model_card import base_card_metadata
from kuea_mllm.swapping.card import render_mllm_card
from kuea_mllm.swapping.compatibility import Examination, examine
from kuea_mllm.swapping.files import MANIFEST_FILE, TowerPlace
from kuea_mllm.swapping.own_shard import has_own_shard, write_own_shard
from kuea_mllm.swapping.receipt import SwapReceipt
from kuea_mllm.swapping.reference import write_reference_swap
from kuea_mllm.swapping.report import CompatibilityReport
from kuea_mllm.swapping.sources import TowerLike, tower_state
from kuea_mllm.towers.files.model_copy import copy_model
from kuea_mllm.towers.model.fingerprint import fingerprint_all, fingerprint_state
from kuea_mllm.towers.model.tower import Tower, build_model
from kuea_mllm.towers.reading.load import load_tower

CARD_FILE = "README.md"
BASE_CARD_FILE = "README.base.md"


@dataclass(frozen=True)
class _Request:
    """What stays the same for all weights of a mix."""

    base: Path
    tower: TowerLike
    adapter: MLLMAdapter
    command: str | None
    reference: str | None
    link: bool
    own_shard: bool


def swap_tower_files(
    base: Path,
    tower: TowerLike,
    out: Path,
    *,
    adapter: MLLMAdapter,
    command: str | None = None,
    allow_same: bool = False,
    force: bool = False,
    images: Path | None = None,
    reference: str | None = None,
    weight: float | None = None,
    measure_drift: bool = True,
    link: bool = True,
    own_shard: bool = False,
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
        force: Accept another activation, layer norm epsilon or normalisation; recorded.
        images: Folder of own probe images for the drift; drawn ones otherwise.
        reference: How the user named the base (a hub id, say); the path if absent.
        weight: Share of `tower` in a mix with the base's own; None is the tower itself.
        measure_drift: Whether both towers are run on probe images first.
        link: Whether unchanged weight files may be hard links to the base's.
        own_shard: Give the tower a weight file of its own, so that later swaps into the result
            write only that; names and number of weight files then differ from the base's.

    Raises:
        TowerMismatch: If the tower does not fit, or is the one that the base holds already.
        UserError: If the base is incomplete or `out` exists.
        EnvironmentFailure: If the disk is full or the written files do not read back.
    """
    started = time.monotonic()
    base, out = Path(base), Path(out)
    _require_place(base, out)
    request = _Request(base, tower, adapter, command, reference, link, own_shard)
    ((examination, report),) = _examine(
        request, [weight], images, measure_drift, force=force, allow_same=allow_same
    )
    _say_warnings(report)
    with atomic_directory(out) as partial:
        return _write(request, examination, report, weight, partial, out, started)


def swap_mixed_files(
    base: Path,
    tower: TowerLike,
    out: Path,
    *,
    weights: Sequence[float],
    adapter: MLLMAdapter,
    command: str | None = None,
    force: bool = False,
    images: Path | None = None,
    reference: str | None = None,
    measure_drift: bool = True,
    link: bool = True,
    own_shard: bool = False,
) -> dict[float, SwapReceipt]:
    """Write one directory `out/<weight>` for each mix of the base's own tower and another one.

    All of them appear at once, or none; see `swap_tower_files` for the arguments.

    Args:
        base: Complete model directory.
        tower: The tower to mix in.
        out: Directory to create.
        weights: Shares of `tower`: 0 gives the base again, 1 the tower, both exactly.
        adapter: The base's adapter.
        command: Command line to record.
        force: Accept what may be forced.
        images: Folder of own probe images.
        reference: How the user named the base.
        measure_drift: Whether towers are run on probe images.
        link: Whether unchanged weight files may be hard links; all mixes then share them.
        own_shard: Give the tower a weight file of its own; all else is then written once.

    Returns:
        The receipts by weight.

    Raises:
        UserError: As `swap_tower_files`; also if a weight is out of range or given twice.
    """
    base, out = Path(base), Path(out)
    _require_place(base, out)
    if not weights or len({f"{weight:g}" for weight in weights}) < len(weights):
        raise UserError("the weights of a mix must be given, and each only once.")
    request = _Request(base, tower, adapter, command, reference, link, own_shard)
    examined = _examine(request, weights, images, measure_drift, force=force)
    receipts: dict[float, SwapReceipt] = {}
    for weight, (_, report) in zip(weights, examined, strict=True):
        _say_warnings(report, f"weight {weight:g}: ")
    with atomic_directory(out) as whole:
        first = whole / f"{weights[0]:g}"
        for weight, (examination, report) in zip(weights, examined, strict=True):
            started = time.monotonic()
            partial = whole / f"{weight:g}"
            partial.mkdir()
            receipts[weight] = _write(
                request,
                examination,
                report,
                weight,
                partial,
                out / partial.name,
                started,
                like=first if partial != first else None,
            )
    return receipts


def tower_fingerprint_of(model_dir: Path, adapter: MLLMAdapter) -> str:
    """Return the fingerprint of the tower in a model directory; reads only the tower's tensors.

    Raises:
        UserError: If the directory is not readable as a model of this adapter.
    """
    model_dir = Path(model_dir)
    state = tower_state(model_dir, adapter.tower_slot(model_dir))
    if state is None:
        raise UserError(f"{model_dir} only names its tower, which is not on this machine.")
    return fingerprint_state(state)


def _require_place(base: Path, out: Path) -> None:
    require_free_output(out)
    if out.resolve().is_relative_to(base.resolve()):
        raise OutputError(f"output {out} lies inside of the base {base}.", "Choose another --out.")


def _examine(
    request: _Request,
    weights: Sequence[float | None],
    images: Path | None,
    measure_drift: bool,
    *,
    force: bool,
    allow_same: bool = False,
) -> list[tuple[Examination, CompatibilityReport]]:
    """Compare, and stop at the first report that refuses."""
    found = examine(
        request.base,
        request.tower,
        request.adapter,
        images=images,
        weights=weights,
        measure_drift=measure_drift,
        allow_same=allow_same,
    )
    examined = []
    for weight in weights:
        examination = found[weight]
        report = examination.report.with_force() if force else examination.report
        if not allow_same and weight is None:
            _require_change(examination, request)
        report.require(str(request.base))
        examined.append((examination, report))
    return examined


def _require_change(examination: Examination, request: _Request) -> None:
    scan = examination.scan
    if scan is not None and scan.before == scan.after:
        raise TowerMismatch(
            f"the tower {request.tower.source} is the one that {request.base} holds already "
            f"({scan.after[:12]}).",
            "Check the path of the tower; nothing was written.",
        )


def _say_warnings(report: CompatibilityReport, prefix: str = "") -> None:
    for check in report.warnings:
        forced = " (forced)" if check.forced else ""
        tower = check.tower.rstrip(".")
        LOGGER.warning("%s%s%s: %s. %s", prefix, check.name, forced, tower, check.remedy)


def _write(
    request: _Request,
    examination: Examination,
    report: CompatibilityReport,
    weight: float | None,
    partial: Path,
    out: Path,
    started: float,
    like: Path | None = None,
) -> SwapReceipt:
    scan, new_state = examination.scan, examination.new_state
    if scan is None or new_state is None:
        raise AssertionError("a report without refusals has compared the weights")
    if examination.place is None:
        files, written, tensors, prefix = _write_reference(request, examination, partial, out)
    else:
        place, files = _write_weights(request, examination.place, new_state, partial, like)
        written = fingerprint_all(place.state(partial))
        tensors, prefix = len(new_state), place.prefix
    if written["float32"] != scan.after:
        raise EnvironmentFailure(
            f"the tower written to {out} does not read back as it was meant to be.",
            "The disk may be faulty; run the command again.",
        )
    receipt = SwapReceipt(
        adapter=request.adapter.name,
        fingerprint_before=scan.before or "",
        fingerprint_after=scan.after,
        tensors_replaced=tensors,
        key_prefix=prefix,
        dtype=new_state.dtype_names,
        seconds=round(time.monotonic() - started, 3),
        compatibility=report,
        **files,
    )
    _write_records(request, examination, receipt, written, weight, partial)
    for name in receipt.files_left_out:
        LOGGER.warning("%s was left out of %s: it holds weights that are not loaded", name, out)
    return receipt


def _write_weights(
    request: _Request,
    place: TowerPlace,
    new_state: Mapping[str, Tensor],
    partial: Path,
    like: Path | None,
) -> tuple[TowerPlace, dict[str, tuple[str, ...]]]:
    if request.own_shard and not has_own_shard(place):
        return write_own_shard(place, new_state, partial, link=request.link, like=like)
    files = copy_model(place.directory, place.entries, new_state, partial, link=request.link)
    return place, files


def _write_reference(
    request: _Request, examination: Examination, partial: Path, out: Path
) -> tuple[dict[str, tuple[str, ...]], dict[str, str], int, str]:
    """Write a base that only names its tower: the tower in a directory of its own, and its name."""
    slot, state = examination.slot, examination.new_state
    if slot.reference is None or state is None:
        raise AssertionError("only a base that names its tower has no place for one")
    given = request.tower
    weights = {**given.canonical_state(), **state}
    model = build_model(given.spec, weights, where=given.source, dtype=None)
    tower = Tower(model, given.spec, given.source, given.layout, given.manifest)
    done = write_reference_swap(request.base, slot, tower, partial, out, link=request.link)
    names = ("files_rewritten", "files_linked", "files_copied", "files_left_out")
    files = {name: tuple(done.get(name, ())) for name in names}
    directory = partial / str(done["directory"])
    written = fingerprint_all(load_tower(directory, dtype=None).canonical_state())
    return files, written, len(state), f"{slot.reference.key} -> {done['directory']}/"


def _write_records(
    request: _Request,
    examination: Examination,
    receipt: SwapReceipt,
    written: Mapping[str, str],
    weight: float | None,
    partial: Path,
) -> None:
    base, tower = request.base, request.tower
    record = read_record(base)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": SWAPPED,
        "adapter": request.adapter.name,
        "base": {"reference": request.reference or str(base), "path": str(base.resolve())},
        "tower": {
            "source": tower.source,
            "layout": tower.layout,
            "fingerprint": examination.tower_fingerprint,
            # Of the tensors as written, so that a runtime in any dtype can be compared with them.
            "fingerprints": dict(written),
            "spec": tower.spec.to_dict(),
            "mix": None if weight is None else {"weight": weight, "rest": "the base's own tower"},
            "manifest": tower.manifest,
        },
        "replaced": {
            "fingerprint_before": receipt.fingerprint_before or None,
            "fingerprint_after": receipt.fingerprint_after,
            "tensors": receipt.tensors_replaced,
            "key_prefix": receipt.key_prefix,
            "dtype": receipt.dtype,
            "files": list(receipt.files_rewritten),
            "files_left_out": list(receipt.files_left_out),
        },
        "slot": describe_slot(examination.slot),
        "compatibility": None if receipt.compatibility is None else receipt.compatibility.to_dict(),
        "base_card": record.get("base_card") or base_card_metadata(base),
        "versions": library_versions(),
        "created": utc_now(),
        "command": request.command,
        "seconds": receipt.seconds,
        "history": _history(record),
    }
    write_json(partial / MANIFEST_FILE, manifest)
    card = partial / CARD_FILE
    if card.exists():
        # The base's own card says things that are no longer true of the copy; one that an earlier
        # swap wrote stands for a record that is kept in the history.
        if record.get("kind") == SWAPPED:
            card.unlink()
        else:
            card.replace(partial / BASE_CARD_FILE)
    card.write_text(render_mllm_card(manifest), encoding="utf-8")


def _history(record: Mapping[str, Any]) -> list[Any]:
    """Return the base's own records, oldest first, each without its history."""
    if not record:
        return []
    earlier = record.get("history")
    previous = {key: value for key, value in record.items() if key != "history"}
    return [*(earlier if isinstance(earlier, list) else []), previous]
