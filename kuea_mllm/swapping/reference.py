"""Swaps where a base only names its tower, as LLaVA does in its authors' layout.

The loader of such a base takes the tower from where its configuration points, whatever the weight
files hold. So the new tower is written into a directory of its own and the configuration points
there; tensors of the old tower inside of the weight files are replaced too, for loaders that read
those. The pointer is an absolute path, because nothing else means the same place in every working
directory: a directory that is moved has to be pointed at its tower again.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kuea_mllm.adapters.base import NAMED_TOWER_DIRECTORY, TowerReference, TowerSlot
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json, write_json
from kuea_mllm.manifest import library_versions, named_source, utc_now
from kuea_mllm.model_files import (
    PICKLE_FILE,
    PICKLE_INDEX_FILE,
    TensorEntry,
    is_weight_file,
    tensor_entries,
)
from kuea_mllm.swapping.files import MANIFEST_FILE
from kuea_mllm.swapping.fit import FittedState
from kuea_mllm.towers.files.checkpoints import read_checkpoint_file
from kuea_mllm.towers.files.model_copy import copy_file, copy_model, files_of, try_link
from kuea_mllm.towers.files.shards import as_planned, loaded_shards, open_shard, write_safetensors
from kuea_mllm.towers.formats import convert, keys
from kuea_mllm.towers.formats.locate import expected_shapes, locate_tensors
from kuea_mllm.towers.model.fingerprint import ROUNDINGS, fingerprint_state
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower

_WEIGHTS = "model.safetensors"
_ANCHOR = "embeddings.patch_embedding.weight"


def write_reference_swap(
    base: Path, slot: TowerSlot, tower: Tower, partial: Path, out: Path, *, link: bool = True
) -> dict[str, Any]:
    """Fill a directory with a base whose configuration points to another tower.

    Args:
        base: Complete model directory, weights in safetensors or in `.bin` files; not changed.
        slot: Its slot; `slot.reference` is set.
        tower: The tower; it keeps its dtype in the directory of its own.
        partial: Existing empty directory to fill.
        out: Where `partial` will be moved to, which is what the configuration has to say.
        link: Whether weight files without tensors of the tower are hard links.

    Returns:
        The files by what was done with them, keyed as in `SwapReceipt`; "directory", where the
        tower is; "tensors_inside", the number of tensors replaced in the weight files.

    Raises:
        TowerMismatch: If the weight files hold a tower that is not the one the slot describes.
        UserError: If the base is incomplete or damaged.
    """
    reference = _required(slot)
    places = _places_inside(base, slot)
    shards = loaded_shards(base)
    is_pickled = not shards[0].endswith(".safetensors")
    if is_pickled:
        done = _write_pickled(base, shards, places, tower, partial, link=link)
    else:
        new_state = FittedState(tower.canonical_state(), places, str(base)) if places else {}
        done = copy_model(base, places, new_state, partial, link=link)
    directory = partial / NAMED_TOWER_DIRECTORY
    if directory.exists():
        # The tower of an earlier swap.
        shutil.rmtree(directory)
    save_tower(tower, directory, manifest=_tower_record(tower))
    _use_released_names(tower, directory / _WEIGHTS)
    config = read_json(base / reference.file)
    config[reference.key] = str(out.resolve() / NAMED_TOWER_DIRECTORY)
    write_json(partial / reference.file, config)
    return {
        **{key: _without_tower(names) for key, names in done.items()},
        "directory": NAMED_TOWER_DIRECTORY,
        "tensors_inside": len(places),
    }


def check_reference(model_dir: Path, slot: TowerSlot) -> list[str]:
    """Find out whether the loader of a directory takes the tower that lies in it.

    Args:
        model_dir: Model directory whose configuration names its tower.
        slot: Its slot.

    Returns:
        One line per problem; empty if the loader takes the tower in the directory.
    """
    reference = _required(slot)
    model_dir = Path(model_dir)
    where, value = f"{reference.file}: {reference.key}", reference.value
    own = model_dir.resolve() / NAMED_TOWER_DIRECTORY
    path = Path(value)
    if not path.is_dir():
        if own.is_dir():
            return [
                f"{where} is {value!r}, which does not exist, so that its loader fails or fetches "
                f"another tower: the directory was moved or copied. Set it to {str(own)!r}."
            ]
        if path.is_absolute():
            return [f"{where} is {value!r}, which does not exist: its loader cannot find a tower."]
        return [
            f"{where} is {value!r}: its loader would download the stock tower again, whatever the "
            "weight files hold."
        ]
    problems = []
    if not path.is_absolute():
        problems.append(
            f"{where} is {value!r}, a relative path: it means another place in every working "
            "directory."
        )
    elif own.is_dir() and path.resolve() != own:
        problems.append(
            f"{where} is {value!r}, another directory than the tower that lies here: the directory "
            f"was copied. Set it to {str(own)!r}."
        )
    return problems + _unreadable(path) + _differs_inside(model_dir, slot, path)


def tower_inside(model_dir: Path, slot: TowerSlot) -> Mapping[str, Tensor] | None:
    """Return the tower in the weight files of a directory that names one, by canonical name.

    It is the named one in published models, but their loader does not read it.

    Returns:
        The tensors, read when asked for; None if the files hold no tower.

    Raises:
        TowerMismatch: If they hold another one than the slot describes.
        UserError: If the weights are incomplete or damaged.
    """
    places = _places_inside(model_dir, slot)
    shards = {entry.file: open_shard(model_dir / entry.file) for entry in places.values()}
    return {name: shards[entry.file][entry.name] for name, entry in places.items()} or None


def _required(slot: TowerSlot) -> TowerReference:
    if slot.reference is None:
        raise ValueError("the slot names no tower; it is to be swapped in the weight files")
    return slot.reference


def _places_inside(base: Path, slot: TowerSlot) -> dict[str, TensorEntry]:
    """Find the tower in the weight files by names and shapes, if it is there at all."""
    entries: dict[str, TensorEntry] = {}
    files = loaded_shards(base)
    if files[0].endswith(".safetensors"):
        entries = tensor_entries(base)
    else:
        for file in files:
            for name, tensor in open_shard(base / file).items():
                entries[name] = TensorEntry(name, file, "", tuple(tensor.shape), 0, 0)
    if not any(name.endswith(_ANCHOR) for name in entries):
        return {}
    expected = expected_shapes(slot.family, slot.vision_config)
    return locate_tensors(entries, expected, module=slot.module, where=str(base))[1]


def _write_pickled(
    base: Path,
    shards: list[str],
    places: Mapping[str, TensorEntry],
    tower: Tower,
    partial: Path,
    *,
    link: bool,
) -> dict[str, tuple[str, ...]]:
    done: dict[str, list[str]] = {"rewritten": [], "linked": [], "copied": [], "left_out": []}
    for name, source in files_of(base):
        target = partial / name
        patches = {key: entry.name for key, entry in places.items() if entry.file == name}
        if patches:
            _rewrite_pickle(source, target, patches, tower, str(base))
            done["rewritten"].append(name)
        elif name in shards:
            done["linked" if link and try_link(source, target) else "copied"].append(name)
            if not target.exists():
                copy_file(source, target)
        elif is_weight_file(name) and not (name == PICKLE_INDEX_FILE and shards != [PICKLE_FILE]):
            done["left_out"].append(name)
        elif name != MANIFEST_FILE:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            done["copied"].append(name)
    return {f"files_{what}": tuple(names) for what, names in done.items()}


def _rewrite_pickle(
    source: Path, target: Path, patches: Mapping[str, str], tower: Tower, where: str
) -> None:
    # Mapped, so that the tensors that stay go from file to file without being held in memory.
    content = copy.copy(read_checkpoint_file(source))
    if not isinstance(content, dict):
        raise UserError(f"file {source} holds a {type(content).__name__}, not a state dict.")
    state = tower.canonical_state()
    old = {key: content[name] for key, name in patches.items()}
    fitted = FittedState({key: state[key] for key in patches}, old, where)
    for key, name in patches.items():
        # Cloned: torch.save would write the whole storage behind a slice.
        content[name] = fitted[key].clone().contiguous()
    torch.save(content, target)


def _tower_record(tower: Tower) -> dict[str, Any]:
    """Return what the tower's own `kuea.json` says; its record stays if it is still that tower."""
    record = tower.manifest or {}
    if record.get("fingerprint") == tower.fingerprint:
        return {key: value for key, value in record.items() if key not in ("fingerprint", "spec")}
    return {
        "kind": "tower",
        "base_tower": named_source(tower.source),
        "source_record": tower.manifest,
        "versions": library_versions(),
        "created": utc_now(),
    }


def _use_released_names(tower: Tower, path: Path) -> None:
    """Write the names of the published towers, with the level that transformers 5 leaves out.

    The transformers of 2023, which the original code needs, would take the shorter names for
    unknown ones and start from random weights.
    """
    if tower.has_projection:
        return
    state = convert.canonical_to_hf(tower.canonical_state())
    path.unlink()
    write_safetensors(path, {name: as_planned(tensor) for name, tensor in state.items()})


def _without_tower(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.startswith(f"{NAMED_TOWER_DIRECTORY}/"))


def _unreadable(path: Path) -> list[str]:
    """Say what keeps the original loader from reading a tower directory."""
    needed = ("config.json", "preprocessor_config.json")
    problems = [f"{path / name} is missing." for name in needed if not (path / name).is_file()]
    weights = path / _WEIGHTS
    if weights.is_file():
        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
        if not any(name.startswith(keys.HF_PREFIX) for name in names):
            problems.append(
                f"{weights} lacks the level {keys.HF_PREFIX!r} in its names, so that the "
                "transformers of the original code starts from random weights."
            )
    return problems


def _differs_inside(model_dir: Path, slot: TowerSlot, path: Path) -> list[str]:
    inside = tower_inside(model_dir, slot)
    if inside is None:
        return []
    dtype = next(iter(inside.values())).dtype
    rounding = dtype if dtype in ROUNDINGS.values() else torch.float32
    named = load_tower(path, dtype=None).model.state_dict()
    if fingerprint_state(inside) == fingerprint_state(named, rounded_to=rounding):
        return []
    return [
        f"the weight files hold another tower than {path}: a loader that reads them would use that "
        "one instead."
    ]
