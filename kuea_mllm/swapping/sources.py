"""Towers out of whatever holds one: a tower in any format, or a whole MLLM."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from kuea_mllm.adapters.base import MLLMAdapter, TowerReference, TowerSlot
from kuea_mllm.adapters.named_tower import local_directory
from kuea_mllm.adapters.records import read_record, tower_fingerprints
from kuea_mllm.adapters.registry import adapter_for
from kuea_mllm.errors import TowerError, UserError
from kuea_mllm.io import read_json
from kuea_mllm.model_files import INDEX_FILE, SINGLE_FILE, tensor_entries
from kuea_mllm.swapping.files import locate_tower
from kuea_mllm.swapping.fit import spec_of_slot
from kuea_mllm.towers.files.shards import FileState
from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.model.fingerprint import fingerprint_state
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.spec import TowerSpec

MLLM_LAYOUT = "mllm_directory"


class TowerLike(Protocol):
    """What a swap needs of a tower: `Tower` has it, and `StoredTower`."""

    @property
    def spec(self) -> TowerSpec:
        """Architecture and preprocessing."""
        ...

    @property
    def source(self) -> str:
        """Where it came from, as the user named it."""
        ...

    @property
    def layout(self) -> str:
        """Name of the format it came in."""
        ...

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Content of its `kuea.json`, None if it has none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Content hash of the vision body."""
        ...

    def canonical_state(self) -> Mapping[str, Tensor]:
        """Return the weights under canonical names."""
        ...


@dataclass
class StoredTower:
    """A tower on disk whose tensors are read one at a time, so that it is never held as a whole.

    Attributes:
        spec: Architecture and preprocessing.
        source: The path or hub id it was named by.
        layout: Name of the format.
        state: Weights by canonical name, read when asked for.
        manifest: Content of its `kuea.json`, None if it has none.
    """

    spec: TowerSpec
    source: str
    layout: str
    state: Mapping[str, Tensor]
    manifest: dict[str, Any] | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Content hash of the vision body; see `fingerprint_state`."""
        return fingerprint_state(self.state)

    def canonical_state(self) -> Mapping[str, Tensor]:
        """Return the weights under canonical names."""
        return self.state


def load_any_tower(
    source: str | Path, *, activation: str | None = None, heads: int | None = None
) -> TowerLike:
    """Load a tower from any format, or the one inside of an MLLM directory.

    Every value is kept as it is stored, so that a swap back to the base's own tower is exact.

    Args:
        source: As for `load_tower`, or a model directory that an adapter recognises.
        activation: For files that do not state it; see `load_tower`.
        heads: Likewise.

    Raises:
        TowerError: If it is neither a tower nor an MLLM with one.
        UserError: If it is an MLLM that cannot be used as a source.
    """
    path = Path(source)
    if not _may_be_mllm(path):
        return _stored(load_tower(source, activation=activation, heads=heads, dtype=None))
    try:
        adapter = adapter_for(path)
    except UserError as no_adapter:
        try:
            # The better message for what is neither: a directory of another kind of model.
            return load_tower(source, activation=activation, heads=heads, dtype=None)
        except TowerError as error:
            raise TowerError(error.problem, f"{error.remedy} {no_adapter.problem}") from error
    return tower_of_mllm(path, adapter)


def tower_of_mllm(model_dir: Path, adapter: MLLMAdapter) -> TowerLike:
    """Take the tower out of an MLLM directory, in the dtype it has there.

    Raises:
        UserError: If the directory only names a tower that is not on this machine.
        TowerMismatch: If the weights hold no such tower.
    """
    adapter.check_base(model_dir)
    slot = adapter.tower_slot(model_dir)
    if slot.reference is not None:
        directory = referenced_directory(slot.reference)
        if directory is None:
            raise UserError(
                f"{model_dir} only names its tower ({slot.reference.value}), which is not on this "
                "machine.",
                "Give that tower itself as --tower.",
            )
        return load_tower(directory, dtype=None)
    state = locate_tower(model_dir, slot).state()
    record = _tower_record(model_dir)
    return StoredTower(spec_of_slot(slot), str(model_dir), MLLM_LAYOUT, state, record)


def referenced_directory(reference: TowerReference) -> Path | None:
    """Return where a tower that a configuration names lies on this machine; never fetches it."""
    return local_directory(reference.value, with_weights=True)


def referenced_state(reference: TowerReference) -> Mapping[str, Tensor] | None:
    """Return the weights of a tower that a configuration names; None if it is not at hand.

    Raises:
        UserError: If it is there and cannot be read.
    """
    directory = referenced_directory(reference)
    return None if directory is None else load_tower(directory, dtype=None).canonical_state()


def tower_state(model_dir: Path, slot: TowerSlot) -> Mapping[str, Tensor] | None:
    """Return the tower that a loader of this directory would use, read when asked for.

    Returns:
        The tensors by canonical name; None if the directory only names a tower that is not on this
        machine.

    Raises:
        TowerMismatch: If the weights hold no such tower.
        UserError: If they are incomplete or damaged.
    """
    if slot.reference is not None:
        return referenced_state(slot.reference)
    return locate_tower(model_dir, slot).state()


def _may_be_mllm(path: Path) -> bool:
    if not (path / "config.json").is_file():
        return False
    config = read_json(path / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    # CLIP and SigLIP name themselves; everything else may be a model around such a tower.
    return not str(model_type).startswith(("clip", "siglip"))


def _stored(tower: Tower) -> TowerLike:
    """Let go of a Hugging Face directory's weights and read them when they are needed."""
    directory = Path(tower.source)
    state = tower.canonical_state()
    if tower.layout != "hf_directory" or not directory.is_dir():
        return tower
    if not any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return tower
    entries = {
        name.removeprefix(keys.HF_PREFIX): entry
        for name, entry in tensor_entries(directory).items()
        if name.removeprefix(keys.HF_PREFIX) in state
    }
    if entries.keys() != state.keys():
        return tower
    lazy = FileState(directory, entries)
    return StoredTower(tower.spec, tower.source, tower.layout, lazy, tower.manifest)


def _tower_record(model_dir: Path) -> dict[str, Any] | None:
    """Return the record of the tower that was swapped into an MLLM."""
    record = read_record(model_dir)
    tower = record.get("tower")
    manifest = tower.get("manifest") if isinstance(tower, Mapping) else None
    return manifest if isinstance(manifest, dict) and tower_fingerprints(record) else None
