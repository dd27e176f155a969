"""What a base model is recognised by, so that LoRA weights never meet another one.

LoRA weights are a difference: on another base of the same shapes they load without a word and
spoil it. A hash of all weights would take a minute per 13 GB; headers, configuration, all vectors
and a sample of every matrix take a second and tell any two trainings apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import TensorEntry, tensor_entries
from kuea_mllm.towers.files.shards import FileState
from kuea_mllm.towers.formats.locate import expected_shapes, locate_tensors
from kuea_mllm.towers.model.fingerprint import fingerprint_state

# Of programs and places, not of the model.
_SKIPPED_KEYS = {
    *("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype"),
    *("architectures", "use_cache", "_attn_implementation", "_commit_hash"),
}
# Read of every matrix at its beginning, middle and end.
_SAMPLE_BYTES = 4096
_WEIGHTS = {
    "tensors": "names and shapes of its tensors",
    "dtypes": "dtypes of its tensors",
    "vision_tower": "vision tower",
    "vectors": "norms and biases",
    "matrices": "weight matrices (a sample of each)",
}


def tower_state(base: Path, slot: TowerSlot) -> FileState:
    """Return the tower in the weight files of a model directory, read when asked for.

    Raises:
        TowerMismatch: If the weights hold no such tower.
        UserError: If the directory only names its tower.
    """
    return FileState(base, _tower_entries(base, tensor_entries(base), slot))


def identify_base(base: Path, slot: TowerSlot, *, fingerprint: str | None = None) -> dict[str, Any]:
    """Return what a model directory is recognised by; no model is loaded.

    The number of weight files and their names do not matter, their content does. A second for 13 GB
    in bfloat16, and as much again for the tower if its fingerprint is not given.

    Args:
        base: Model directory in Hugging Face form.
        slot: Its tower.
        fingerprint: Of the tower, where it is known.

    Returns:
        JSON values: `config`, the settings of config.json; hashes of the rest; `vision_tower`, the
        fingerprint.

    Raises:
        TowerMismatch: If the weights hold no such tower.
        UserError: If the directory is incomplete or damaged.
    """
    base = Path(base)
    entries = tensor_entries(base)
    tower = _tower_entries(base, entries, slot)
    inside = {entry.name for entry in tower.values()}
    rest = [entry for name, entry in sorted(entries.items()) if name not in inside]
    return {
        "config": dict(_flat(read_model_config(base))),
        "tensors": _digest(f"{name} {entry.shape}" for name, entry in sorted(entries.items())),
        "dtypes": _digest(f"{name} {entry.dtype}" for name, entry in sorted(entries.items())),
        "vision_tower": fingerprint or fingerprint_state(FileState(base, tower)),
        "vectors": _content(base, [entry for entry in rest if len(entry.shape) < 2], None),
        "matrices": _content(
            base, [entry for entry in rest if len(entry.shape) > 1], _SAMPLE_BYTES
        ),
    }


def recorded_identity(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what LoRA weights say of their base, None if they do not.

    Args:
        record: Content of their `kuea.json`; `base` holds what `identify_base` returned beside the
            base's `reference`.
    """
    base = record.get("base")
    stated = base if isinstance(base, Mapping) else {}
    found = {key: stated[key] for key in ("config", *_WEIGHTS) if key in stated}
    return found or None


def require_same_base(identity: Mapping[str, Any], base: Path, slot: TowerSlot) -> dict[str, Any]:
    """Make sure that a model directory is the one that LoRA weights were trained on.

    Args:
        identity: What `identify_base` returned for that one.
        base: The directory in question.
        slot: Its tower.

    Returns:
        The identity of `base`.

    Raises:
        UserError: Naming what differs.
    """
    found = identify_base(base, slot)
    differences = [
        *_config_differences(identity.get("config") or {}, found["config"]),
        *(what for key, what in _WEIGHTS.items() if identity.get(key) != found[key]),
    ]
    if not differences:
        return found
    first, others = differences[0], len(differences) - 1
    # The names of the tensors are hashed with everything else: one cause, many effects.
    more = f" (and {', '.join(differences[1:])})" if 0 < others < len(_WEIGHTS) else ""
    remedy = "Give the directory that they were trained on, unchanged, with --base."
    if differences == [_WEIGHTS["vision_tower"]]:
        remedy = (
            "Only the tower differs: they were tuned to the tokens of "
            f"{str(identity.get('vision_tower'))[:12]}, this base holds "
            f"{found['vision_tower'][:12]}. Merge into the base they were trained on, and swap "
            "the tower afterwards if that is what you want."
        )
    raise UserError(
        f"these LoRA weights were trained on another base than {base}: they differ in {first}"
        f"{more}.",
        remedy,
    )


def _tower_entries(
    base: Path, entries: Mapping[str, TensorEntry], slot: TowerSlot
) -> dict[str, TensorEntry]:
    if slot.reference is not None:
        raise UserError(
            f"{base} only names its tower ({slot.reference.value}): it is in its authors' layout.",
            "Convert it first: kuea-mllm convert DIR NEW --mllm llava.",
        )
    shapes = expected_shapes(slot.family, slot.vision_config)
    _, found = locate_tensors(entries, shapes, module=slot.module, where=str(base))
    return found


def _config_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    return [f"config.json: {key} ({then.get(key)!r} then, {now.get(key)!r} now)" for key in keys]


def _flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(content.items()):
        if key in _SKIPPED_KEYS:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        elif value is not None:
            yield f"{above}{key}", value


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content(base: Path, entries: list[TensorEntry], sample: int | None) -> str:
    """Hash the bytes of tensors, or of three samples of each."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {entry.file for entry in entries}
        streams = {file: stack.enter_context((base / file).open("rb")) for file in files}
        # In the order of names, so that another division into files gives the same.
        for entry in entries:
            digest.update(f"{entry.name}\n".encode())
            stream, size = streams[entry.file], entry.end - entry.start
            length = size if sample is None else min(sample, size)
            middle = entry.start + (size - length) // 2
            for start in dict.fromkeys((entry.start, middle, entry.end - length)):
                stream.seek(start)
                digest.update(stream.read(length))
    return digest.hexdigest()
