"""The compatibility report: everything that can be known before the first byte is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from kuea_mllm.adapters.base import MLLMAdapter, TowerSlot
from kuea_mllm.adapters.reading import ChecksReading
from kuea_mllm.adapters.records import PEFT_CONFIG, read_record
from kuea_mllm.errors import UserError
from kuea_mllm.swapping.drift import Lent, compare_towers, describe_tap, drift_checks
from kuea_mllm.swapping.files import TowerPlace, locate_tower
from kuea_mllm.swapping.fit import FittedState, architecture_checks, spec_of_slot
from kuea_mllm.swapping.lineage import (
    NEAR_COSINE,
    WeightScan,
    judge_lineage,
    scan_weights,
    value_check,
)
from kuea_mllm.swapping.reference import tower_inside
from kuea_mllm.swapping.report import Check, CompatibilityReport, Drift, Lineage
from kuea_mllm.swapping.sources import TowerLike, referenced_state
from kuea_mllm.towers.formats.locate import OPTIONAL
from kuea_mllm.towers.model.mix import mix_states
from kuea_mllm.towers.model.weight_checks import rounded_to_half

__all__ = [
    "Check",
    "CompatibilityReport",
    "Drift",
    "Examination",
    "Lineage",
    "examine",
    "inspect_fit",
]


@dataclass(frozen=True)
class Examination:
    """What was found out about a base and a tower, for the report and for the swap.

    Attributes:
        report: The report, before `--force`.
        slot: The base's slot.
        place: Where the base's own tower lies; None if the base only names one.
        new_state: The new tower's tensors as they will be stored; None if it does not fit.
        scan: What the weights say; None likewise.
        tower_fingerprint: Of the new tower as it was given; empty likewise.
    """

    report: CompatibilityReport
    slot: TowerSlot
    place: TowerPlace | None
    new_state: FittedState | None = None
    scan: WeightScan | None = None
    tower_fingerprint: str = ""


def inspect_fit(
    base: Path,
    tower: TowerLike,
    adapter: MLLMAdapter,
    images: Path | None = None,
    *,
    weight: float | None = None,
    measure_drift: bool = True,
    allow_same: bool = False,
) -> CompatibilityReport:
    """Report how well a tower fits a base; nothing is written.

    Args:
        base: Complete model directory.
        tower: The tower to put in.
        adapter: The base's adapter.
        images: Folder of own probe images; drawn ones otherwise.
        weight: Share of `tower` in a mix with the base's own; None is the tower itself.
        measure_drift: Whether both towers are run.
        allow_same: Accept a tower that the base holds already.

    Raises:
        UserError: If the base is incomplete or no tower is found in it.
    """
    found = examine(
        base,
        tower,
        adapter,
        images=images,
        weights=[weight],
        measure_drift=measure_drift,
        allow_same=allow_same,
    )
    return found[weight].report


def examine(
    base: Path,
    tower: TowerLike,
    adapter: MLLMAdapter,
    *,
    images: Path | None = None,
    weights: Sequence[float | None] = (None,),
    measure_drift: bool = True,
    allow_same: bool = False,
) -> dict[float | None, Examination]:
    """Compare a base with a tower, or with mixes of both, as far as what was found before allows.

    See `inspect_fit` for the arguments; what all mixes share is read once.
    """
    base = Path(base)
    adapter.check_base(base)
    slot = adapter.tower_slot(base)
    checks = (
        *architecture_checks(slot, tower.spec),
        *_reading_checks(slot, tower, adapter, base),
        *_file_checks(base),
    )
    place, own = _own_tower(base, slot)
    shared = Examination(CompatibilityReport(checks), slot, place)
    if any(not check.can_force for check in shared.report.refusals):
        return dict.fromkeys(weights, shared)
    is_mix = any(weight is not None for weight in weights)
    mix_checks = _mix_checks(tower, own, base) if is_mix else []
    return {
        weight: _examine_weights(
            shared,
            base,
            own,
            tower,
            weight,
            images,
            [] if weight is None else mix_checks,
            measure_drift=measure_drift,
            allow_same=allow_same,
        )
        for weight in weights
    }


def _examine_weights(
    shared: Examination,
    base: Path,
    own: Mapping[str, Tensor] | None,
    tower: TowerLike,
    weight: float | None,
    images: Path | None,
    mix_checks: Sequence[Check],
    *,
    measure_drift: bool,
    allow_same: bool,
) -> Examination:
    """Go on with what only the weights tell; the configurations agree."""
    slot, place, checks = shared.slot, shared.place, [*shared.report.checks]
    state = _new_state(tower, own, weight, base)
    # A tower that lies in a directory of its own keeps the dtype it has.
    targets = state if place is None else place.entries
    fitted = FittedState(state, targets, str(base))
    scan = scan_weights(own, fitted)
    checks.append(value_check(scan, fitted))
    is_as_given = scan.is_exact and weight is None
    fingerprint = scan.after if is_as_given else tower.fingerprint
    lineage, check = judge_lineage(
        scan,
        tower_fingerprint=fingerprint,
        tower_record=tower.manifest,
        base_record=read_record(base),
    )
    if lineage.relation == "same" and weight is None and not allow_same:
        check = replace(check, verdict="refuse", remedy=_SAME)
    checks.extend([check, *mix_checks])
    if lineage.relation not in ("same", "original"):
        checks.extend(_rounding_checks(tower, fitted))
    drift = None
    is_stopped = any(not check.can_force for check in CompatibilityReport(tuple(checks)).refusals)
    if measure_drift and not is_stopped and scan.before != scan.after:
        drift = _measure(own, fitted, tower, slot, images)
        checks.extend(drift_checks(drift) if drift is not None else [_DRIFT_UNKNOWN])
    report = CompatibilityReport(tuple(checks), lineage, drift)
    return Examination(report, slot, place, fitted, scan, fingerprint)


_SAME = "Check the path of the tower; --allow-same writes a copy of the base all the same."
_DRIFT_UNKNOWN = Check(
    "drift",
    "not on this machine",
    "not measured",
    "warn",
    "The base only names its tower, so how far the new one is from it is not known; download that "
    "tower to have it measured.",
)


def _own_tower(
    base: Path, slot: TowerSlot
) -> tuple[TowerPlace | None, Mapping[str, Tensor] | None]:
    """Find the base's own tower: in its weights, or where its configuration points."""
    if slot.reference is not None:
        # Published models hold the tower that they name in their weight files as well.
        return None, referenced_state(slot.reference) or tower_inside(base, slot)
    place = locate_tower(base, slot)
    return place, place.state()


def _new_state(
    tower: TowerLike, own: Mapping[str, Tensor] | None, weight: float | None, base: Path
) -> Mapping[str, Tensor]:
    if weight is None:
        return tower.canonical_state()
    if own is None:
        raise UserError(
            f"{base} only names its own tower, which is not on this machine, so there is nothing "
            "to mix with.",
            "Download that tower first, or mix two towers with `kuea-mllm convert --interpolate`.",
        )
    # No MLLM reads projection or pooling head, and not every base keeps one.
    return mix_states(_Body(own), _Body(tower.canonical_state()), weight)


class _Body(Mapping[str, Tensor]):
    """The part of a tower that MLLMs read; tensors are still read when they are asked for."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self._names = [name for name in state if not name.startswith(OPTIONAL)]

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _measure(
    own: Mapping[str, Tensor] | None,
    fitted: FittedState,
    tower: TowerLike,
    slot: TowerSlot,
    images: Path | None,
) -> Drift | None:
    if own is None:
        return None
    canonical = tower.canonical_state()
    pooling = {name: canonical[name] for name in canonical if name.startswith(OPTIONAL)}
    return compare_towers(spec_of_slot(slot), own, Lent(fitted, pooling), slot.tap, images=images)


def _file_checks(base: Path) -> Iterator[Check]:
    if (base / PEFT_CONFIG).is_file():
        remedy = (
            "transformers would load that adapter on top of the result. Merge it into the base "
            "first, or remove its files from a copy."
        )
        problem = f"its base is beside a PEFT adapter, the one that {PEFT_CONFIG} describes"
        yield Check(
            "base", "a whole model", "beside a PEFT adapter", "refuse", remedy, problem=problem
        )


def _mix_checks(tower: TowerLike, own: Mapping[str, Tensor] | None, base: Path) -> list[Check]:
    """Warn of a mix of two towers that do not descend from each other; refuse one of equal ones."""
    if own is None:
        return []
    body = _Body(own)
    scan = scan_weights(body, FittedState(_Body(tower.canonical_state()), body, str(base)))
    if scan.before == scan.after:
        return [
            Check(
                "mix",
                "another tower",
                "the same weights",
                "refuse",
                "Check the path of the tower.",
                problem=f"{tower.source} is the tower that it holds already, so there is nothing "
                "to mix",
            )
        ]
    if scan.cosine is not None and scan.cosine < NEAR_COSINE:
        remedy = (
            "The average of two independent trainings is no tower at all. Mix a tower with the one "
            "that it was fine-tuned from."
        )
        found = f"weights of cosine {scan.cosine:.4f}"
        return [Check("mix", "its own tower", found, "warn", remedy)]
    return []


def _rounding_checks(tower: TowerLike, fitted: FittedState) -> Iterator[Check]:
    """Warn of a tower that was rounded on its way, where the base would have kept its digits."""
    if fitted.dtype_names != "float32":
        return
    half = rounded_to_half(tower.canonical_state())
    if half is not None:
        remedy = (
            "A loader on the way rounded it (open_clip does so with OpenAI's format); up to three "
            "digits of what the training changed are lost. Take the file that the training wrote."
        )
        yield Check("rounding", "float32", f"{half} values in float32", "warn", remedy)


def _reading_checks(
    slot: TowerSlot, tower: TowerLike, adapter: MLLMAdapter, base: Path
) -> Iterator[Check]:
    spec = tower.spec
    offered = f"{spec.layers} blocks of width {spec.width}"
    if slot.tap is None:
        remedy = "It is not known which tokens this model reads; the penultimate layer is compared."
        yield Check("tokens read", "unknown", offered, "warn", remedy)
    else:
        deepest = spec.layers + 1
        fits = all(-deepest <= layer < deepest for layer in slot.tap.layers)
        remedy = "" if fits else "The base reads a layer that the tower does not have."
        yield Check(
            "tokens read", describe_tap(slot.tap), offered, "ok" if fits else "refuse", remedy
        )
    if slot.projector_width is not None:
        fits = slot.projector_width == spec.width
        remedy = "" if fits else "The projector was made for tokens of another width."
        yield Check(
            "projector input",
            f"width {slot.projector_width}",
            f"width {spec.width}",
            "ok" if fits else "refuse",
            remedy,
        )
    if isinstance(adapter, ChecksReading):
        for problem in adapter.reading_problems(base):
            yield Check(
                problem.setting,
                f"{problem.found} (usual: {problem.usual})",
                "any",
                "warn",
                problem.consequence,
            )
