"""Whether a tower descends from the one that a base holds: by their records, and by their weights.

A record can only prove descent; where it is silent, the weights tell. Fine-tuning moves every
weight a little, so that a tower lies near the one it started from; two independent trainings share
nothing but their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.swapping.fit import FittedState
from kuea_mllm.swapping.report import Check, Lineage, Relation
from kuea_mllm.towers.model.fingerprint import fingerprint_state

# Cosine between the weight matrices of two towers. KUEA's learning rate of 1e-5 moves them by a few
# percent (cosine above 0.99); independent trainings are near 0. Between the two lies what a mix or
# a long training with a high rate gives.
NEAR_COSINE = 0.8
UNRELATED_COSINE = 0.3


@dataclass(frozen=True)
class WeightScan:
    """One pass over all weights of both towers.

    Attributes:
        before: Fingerprint of the base's own tower; None if it could not be read.
        after: Fingerprint of the new tower as it will be stored.
        distance: `|new - base| / |base|`, None without the base's own.
        cosine: Between the matrices of both, None likewise.
        not_finite: First tensor of the new tower that holds NaN or infinity.
        overflow: First tensor that the base's dtype cannot hold.
        is_exact: Whether every tensor is stored in the dtype that the tower has.
        rounding: `|stored - tower| / |tower|`: what the cast to the base's dtype costs.
    """

    before: str | None
    after: str
    distance: float | None
    cosine: float | None
    not_finite: str | None
    overflow: str | None
    is_exact: bool
    rounding: float


def scan_weights(base: Mapping[str, Tensor] | None, fitted: FittedState) -> WeightScan:
    """Read both towers once, tensor by tensor.

    Args:
        base: The base's own tower by canonical name, None if it is not at hand.
        fitted: The new tower as it will be stored.
    """
    watched = _Watched(base, fitted)
    # Hashing and casting let go of Python's lock: both towers at once take half the time.
    with ThreadPoolExecutor(1) as background:
        own = None if base is None else background.submit(fingerprint_state, base)
        after = fingerprint_state(watched)
        # The pooling head is not part of the fingerprint.
        for name in fitted.keys() - watched.seen:
            watched[name]
        before = None if own is None else own.result()
    return WeightScan(
        before=before,
        after=after,
        distance=None if base is None else _ratio(watched.moved, watched.base_size),
        cosine=None
        if base is None
        else watched.product / max(math.sqrt(watched.matrices * watched.base_matrices), 1e-300),
        not_finite=watched.not_finite,
        overflow=watched.overflow,
        is_exact=watched.is_exact,
        rounding=_ratio(watched.rounded, watched.size),
    )


def judge_lineage(
    scan: WeightScan,
    *,
    tower_fingerprint: str,
    tower_record: Mapping[str, Any] | None,
    base_record: Mapping[str, Any],
) -> tuple[Lineage, Check]:
    """Say how the new tower and the base's own are related, and what that means for a swap.

    Args:
        scan: What the weights say.
        tower_fingerprint: Fingerprint of the new tower as it was loaded.
        tower_record: The new tower's `kuea.json`, None if it has none.
        base_record: The base's `kuea.json`, empty if it has none.
    """
    start = starting_fingerprints(tower_record, tower_fingerprint)
    held_before = replaced_fingerprints(base_record)
    named = _start_name(tower_record)
    relation: Relation
    if scan.before == scan.after:
        relation, evidence = "same", "Both towers have the same fingerprint."
    elif scan.after in held_before:
        relation, evidence = "original", "The base held this very tower before an earlier swap."
    elif scan.before in start:
        relation = "descends"
        evidence = f"The tower's kuea.json says that it started from this very tower ({named})."
    elif start & held_before:
        relation = "sibling"
        evidence = f"The tower started from one that this base held before its last swap ({named})."
    else:
        relation, evidence = _by_weights(scan)
    lineage = Lineage(relation, evidence, _rounded(scan.distance), _rounded(scan.cosine))
    return lineage, _verdict(lineage, names_another=bool(start), named=named)


def value_check(scan: WeightScan, fitted: FittedState) -> Check:
    """Say whether the base's dtype can hold the tower."""
    stored = fitted.dtype_names
    if scan.not_finite is not None:
        remedy = "Check the tower: its training may have diverged, or its file is damaged."
        found = f"NaN or infinity in {scan.not_finite}"
        problem = f"its values hold {found}, the base asks for finite"
        return Check("values", "finite", found, "refuse", remedy, problem=problem)
    if scan.overflow is not None:
        remedy = "Use a base in bfloat16 or float32; the tower has values beyond the dtype's range."
        found = f"{scan.overflow} overflows"
        problem = f"its values are too large: {found}, the base asks for {stored}"
        return Check("values", stored, found, "refuse", remedy, problem=problem)
    rounding = f"rounding changes the weights by {scan.rounding:.1e}" if scan.rounding else "exact"
    return Check("values", f"stored as {stored}", f"finite; {rounding}")


def starting_fingerprints(record: Mapping[str, Any] | None, own: str) -> set[str]:
    """Return the fingerprints, under each rounding, of the tower that another one started from.

    Empty if the record does not say, or only tells of a conversion (where start and result agree).
    """
    start = (record or {}).get("base_tower")
    if not isinstance(start, Mapping):
        return set()
    rounded = start.get("fingerprints")
    found = {*(rounded.values() if isinstance(rounded, Mapping) else ()), start.get("fingerprint")}
    texts = {value for value in found if isinstance(value, str)}
    return set() if own in texts else texts


def replaced_fingerprints(record: Mapping[str, Any]) -> set[str]:
    """Return the fingerprints of the towers that earlier swaps took out of a base."""
    history = record.get("history")
    entries = [record, *(history if isinstance(history, list) else [])]
    replaced = (entry.get("replaced") for entry in entries if isinstance(entry, Mapping))
    found = (entry.get("fingerprint_before") for entry in replaced if isinstance(entry, Mapping))
    return {value for value in found if isinstance(value, str)}


def _by_weights(scan: WeightScan) -> tuple[Relation, str]:
    if scan.cosine is None or scan.distance is None:
        return "unknown", "The base's own tower is not on this machine, so nothing was compared."
    numbers = f"cosine of the weights {scan.cosine:.4f}, relative distance {scan.distance:.4f}"
    if scan.cosine >= NEAR_COSINE:
        return "near", f"The weights lie close to the base's own ({numbers})."
    if scan.cosine >= UNRELATED_COSINE:
        return "far", f"The weights lie far from the base's own ({numbers})."
    return "unrelated", f"The weights have nothing in common with the base's own ({numbers})."


def _verdict(lineage: Lineage, *, names_another: bool, named: str) -> Check:
    base, tower = "its own tower", f"{lineage.relation}: {lineage.evidence}"
    if lineage.relation == "unrelated":
        return Check(
            "lineage",
            base,
            tower,
            "warn",
            "This is another tower of the same shape. The projector and the language model were "
            "not trained on its tokens; expect useless answers unless they are trained again.",
        )
    if lineage.relation == "far":
        remedy = "Check that it started from the base's own tower, and evaluate before use."
        return Check("lineage", base, tower, "warn", remedy)
    if lineage.relation == "near" and names_another:
        return Check(
            "lineage",
            base,
            tower,
            "warn",
            f"Its kuea.json says that it started from {named}, which is not the tower in this "
            "base, though close to it: the base's tower was fine-tuned (LoRA, say) or rounded in "
            "another way. What that tuning taught it is lost by the swap; align from the base's "
            "own tower to keep it.",
        )
    if lineage.relation == "unknown":
        remedy = "Give the base with its tower, or make sure yourself that they belong together."
        return Check("lineage", base, tower, "warn", remedy)
    return Check("lineage", base, tower)


def _start_name(record: Mapping[str, Any] | None) -> str:
    start = (record or {}).get("base_tower")
    reference = start.get("reference") if isinstance(start, Mapping) else None
    return str(reference or "not named")


class _Watched(Mapping[str, Tensor]):
    """The fitted tower; adds up sizes and distances while it is read by someone else."""

    def __init__(self, base: Mapping[str, Tensor] | None, fitted: FittedState) -> None:
        self._base, self._fitted = base, fitted
        self.seen: set[str] = set()
        self.moved = self.base_size = self.rounded = self.size = 0.0
        self.product = self.matrices = self.base_matrices = 0.0
        self.not_finite: str | None = None
        self.overflow: str | None = None
        self.is_exact = True

    def __getitem__(self, name: str) -> Tensor:
        source, stored = self._fitted.both(name)
        if name not in self.seen:
            self.seen.add(name)
            self._add(name, source, stored)
        return stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._fitted)

    def __len__(self) -> int:
        return len(self._fitted)

    def _add(self, name: str, source: Tensor, stored: Tensor) -> None:
        new = stored.to(torch.float32).flatten()
        size = _dot(new, new)
        if not math.isfinite(size):
            self._blame(name, source, new)
            return
        self.size += size
        if source.dtype != stored.dtype:
            self.is_exact = False
            self.rounded += _square(source.to(torch.float32).flatten() - new)
        if self._base is None or name not in self._base:
            return
        own = self._base[name].to(torch.float32).flatten()
        own_size = _dot(own, own)
        self.base_size += own_size
        self.moved += _square(new - own)
        if stored.ndim > 1:
            self.product += _dot(new, own)
            self.matrices += size
            self.base_matrices += own_size

    def _blame(self, name: str, source: Tensor, new: Tensor) -> None:
        # The square may overflow where the values do not.
        if bool(torch.isfinite(new).all()):
            self.size += float(new.double().square().sum())
        elif not bool(torch.isfinite(source).all()):
            self.not_finite = self.not_finite or name
        else:
            self.overflow = self.overflow or name


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def _square(a: Tensor) -> float:
    return float(torch.dot(a, a))


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else 0.0


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
