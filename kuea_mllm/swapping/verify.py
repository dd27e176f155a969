"""Which tower is in a model directory, recomputed from its files, and is it the recorded one?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.base import MLLMAdapter, TowerSlot
from kuea_mllm.adapters.records import (
    RECORD_FILE,
    SWAPPED,
    changed_settings,
    name_tower,
    read_record,
    rival_weights,
    tower_fingerprints,
)
from kuea_mllm.adapters.registry import adapter_for, get_adapter
from kuea_mllm.swapping.reference import check_reference
from kuea_mllm.swapping.sources import TowerLike, tower_state
from kuea_mllm.towers.model.fingerprint import ROUNDINGS, fingerprint_all, fingerprint_state


@dataclass(frozen=True)
class Verification:
    """What was found in a model directory.

    Attributes:
        directory: The model directory.
        adapter: Name of the adapter that read it.
        fingerprint: Of the tower that a loader would use; None if it lies elsewhere and is not on
            this machine.
        dtype: Of its tensors; several are joined by "+". None likewise.
        tower: Which tower it is, in words.
        is_tower: Whether it is the tower that was asked about; None if none was.
        problems: Everything that is not as the record says, or that could make a loader use
            another tower. Empty for a directory that is what it claims to be.
    """

    directory: str
    adapter: str
    fingerprint: str | None
    dtype: str | None
    tower: str
    is_tower: bool | None
    problems: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"ok": self.is_good, **asdict(self), "problems": list(self.problems)}


def verify_model(
    model_dir: Path, *, tower: TowerLike | None = None, adapter: MLLMAdapter | None = None
) -> Verification:
    """Recompute which tower a model directory holds and compare it with what is recorded.

    Only the tower's tensors are read. Changes to the language model or the projector are not seen.

    Args:
        model_dir: Output of `swap`; any other model directory if `tower` is given.
        tower: The tower that should be inside; None compares with the record only.
        adapter: The model's adapter; taken from the record, or recognised.

    Raises:
        UserError: If the directory is not a model that an adapter can read.
    """
    model_dir = Path(model_dir)
    record = read_record(model_dir)
    is_swapped = record.get("kind") == SWAPPED
    if adapter is None:
        adapter = get_adapter(str(record["adapter"])) if is_swapped else adapter_for(model_dir)
    adapter.check_base(model_dir)
    slot = adapter.tower_slot(model_dir)
    state = tower_state(model_dir, slot)
    found = None if state is None else fingerprint_state(state)
    dtype = None if state is None else _dtype_names(state)
    problems = _reference_problems(model_dir, slot)
    if is_swapped:
        problems += _record_problems(model_dir, record, found, slot)
    elif tower is None:
        problems.append(_missing_record(record))
    if slot.reference is None:
        problems += rival_weights(model_dir)
    is_tower = None
    if tower is not None:
        is_tower = found is not None and found in _possible_fingerprints(tower, dtype)
        if not is_tower:
            problems.append(
                f"the tower inside ({_short(found)}) is not {tower.source} "
                f"({_short(tower.fingerprint)}), nor that one rounded to {dtype}."
            )
    name = name_tower(record if is_swapped else {}, found or "")
    if is_tower and tower is not None and name.startswith("unknown"):
        name = f"{tower.source}, the one that was asked about"
    return Verification(
        directory=str(model_dir),
        adapter=adapter.name,
        fingerprint=found,
        dtype=dtype,
        tower=name,
        is_tower=is_tower,
        problems=tuple(problems),
    )


def _reference_problems(model_dir: Path, slot: TowerSlot) -> list[str]:
    if slot.reference is None:
        return []
    return list(check_reference(model_dir, slot))


def _record_problems(
    model_dir: Path, record: Mapping[str, Any], found: str | None, slot: TowerSlot
) -> list[str]:
    problems = []
    replaced = record.get("replaced")
    before = replaced.get("fingerprint_before") if isinstance(replaced, Mapping) else None
    recorded = tower_fingerprints(record)
    if not recorded:
        problems.append(f"{RECORD_FILE} records no fingerprint of the tower.")
    elif found is not None and found == before and found not in recorded:
        problems.append(
            f"the tower inside is still (or again) the one that {RECORD_FILE} says was replaced "
            f"({_short(found)}): the weights were put back, or {RECORD_FILE} is of another "
            "directory."
        )
    elif found is not None and found not in recorded:
        problems.append(
            f"the tower inside ({_short(found)}) is not the one that {RECORD_FILE} records "
            f"({_short(_recorded(record))}): its weights were changed after the swap, or "
            f"{RECORD_FILE} is of another directory. Swap again into a new directory."
        )
    return [*problems, *changed_settings(record, slot)]


def _missing_record(record: Mapping[str, Any]) -> str:
    if record:
        return (
            f"{RECORD_FILE} is of kind {record.get('kind')!r}, not of a swapped model: it belongs "
            "to another directory."
        )
    return (
        f"there is no {RECORD_FILE}, so nothing says which tower should be inside: this is an "
        "untouched base, or the file was lost. Name the tower with --tower."
    )


def _possible_fingerprints(tower: TowerLike, dtype: str | None) -> set[str]:
    state = tower.canonical_state()
    if dtype not in ROUNDINGS:
        return set(fingerprint_all(state).values())
    return {fingerprint_state(state, rounded_to=ROUNDINGS[dtype])}


def _recorded(record: Mapping[str, Any]) -> str | None:
    value = record["tower"]["fingerprints"].get("float32")
    return value if isinstance(value, str) else None


def _short(fingerprint: str | None) -> str:
    return "not on this machine" if fingerprint is None else fingerprint[:12]


def _dtype_names(state: Mapping[str, Any]) -> str:
    return "+".join(sorted({str(state[name].dtype).removeprefix("torch.") for name in state}))
