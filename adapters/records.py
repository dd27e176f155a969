"""What `kuea.json` says about the tower in a model directory, and whether that is still true.

Used wherever a tower is named: by `verify`, before an evaluation, on a card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json
from kuea_mllm.model_files import is_weight_file, weight_files

RECORD_FILE = "kuea.json"
SWAPPED = "mllm"

_SLOT_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("patch_size", "image_size", "hidden_act", "layer_norm_eps"),
)
# How a slot's settings are called where their own names say little, or lie in another file.
_SETTINGS = {
    "layers": "config.json: layers read",
    "drops_cls": "config.json: first token left out",
    "after_norm": "config.json: final norm applied",
    "mean": "image processor: image_mean",
    "std": "image processor: image_std",
}
# Files that some loader takes for the model's weights, beside those that transformers would load.
_OTHER_WEIGHTS = ("pytorch_model", "model", "consolidated", "tf_model", "flax_model")
PEFT_CONFIG = "adapter_config.json"


def read_record(model_dir: Path) -> dict[str, Any]:
    """Read what was recorded about a model; empty for an untouched base.

    Raises:
        UserError: If the file is not a JSON object.
    """
    path = Path(model_dir) / RECORD_FILE
    record = read_json(path) if path.is_file() else {}
    if not isinstance(record, dict):
        raise UserError(
            f"file {path} does not hold a JSON object.",
            "Restore it, or remove it: the directory then counts as an untouched base.",
        )
    return record


def describe_slot(slot: TowerSlot) -> dict[str, Any]:
    """Return what of a slot decides over the outputs of a tower, as plain JSON values."""
    return {
        "family": slot.family,
        "vision_config": {key: slot.vision_config.get(key) for key in _SLOT_KEYS},
        "tap": None if slot.tap is None else _plain(asdict(slot.tap)),
        "mean": _plain(slot.mean),
        "std": _plain(slot.std),
    }


def name_tower(record: Mapping[str, Any], fingerprint: str) -> str:
    """Say in words which tower has a fingerprint, as far as a model's record knows.

    Args:
        record: Content of the model's `kuea.json`; empty if it has none.
        fingerprint: Of the tower in use, under any rounding.
    """
    if fingerprint in tower_fingerprints(record):
        return _name_recorded(_mapping(record, "tower"))
    replaced = _mapping(record, "replaced")
    base = _mapping(record, "base").get("reference", "an unnamed base")
    if fingerprint == replaced.get("fingerprint_before"):
        return f"the tower that {base} held before the swap"
    for entry in reversed(_history(record)):
        if fingerprint in tower_fingerprints(entry):
            return f"{_name_recorded(_mapping(entry, 'tower'))} (of an earlier swap)"
        if fingerprint == _mapping(entry, "replaced").get("fingerprint_before"):
            origin = _mapping(entry, "base").get("reference", "an unnamed base")
            return f"the tower that {origin} held before its first swap"
    return "unknown" if record else "unknown: there is no kuea.json"


def tower_fingerprints(record: Mapping[str, Any]) -> set[str]:
    """Return the recorded fingerprints of the tower in a model, under every rounding."""
    found = _mapping(_mapping(record, "tower"), "fingerprints").values()
    return {value for value in found if isinstance(value, str)}


def changed_settings(record: Mapping[str, Any], slot: TowerSlot) -> list[str]:
    """Compare the settings that decide over a tower's outputs with those at the swap.

    Returns:
        One line per difference; empty if all is as it was, or the record does not say.
    """
    then, now = _mapping(record, "slot"), describe_slot(slot)
    if not then:
        return []
    flat_then, flat_now = _flat(then), _flat(now)
    return [
        f"{_SETTINGS.get(key, f'config.json: {key}')} was {flat_then.get(key)} at the swap and is "
        f"{value} now: the tower gives other outputs."
        for key, value in flat_now.items()
        if flat_then.get(key) != value
    ]


def rival_weights(model_dir: Path) -> list[str]:
    """Find weight files that another loader could take instead of the right ones.

    Returns:
        One line per file, or for a PEFT adapter that would be loaded on top.

    Raises:
        UserError: If the directory holds no weights.
    """
    model_dir = Path(model_dir)
    loaded = {*weight_files(model_dir)}
    if len(loaded) > 1 or not loaded & {"model.safetensors"}:
        loaded.add("model.safetensors.index.json")
    problems = [
        f"{path.name} lies beside {sorted(loaded)[0]}: a loader that prefers it would use other "
        "weights, with the tower from before."
        for path in sorted(model_dir.iterdir())
        if is_weight_file(path.name)
        and path.name not in loaded
        and (path.name.startswith(_OTHER_WEIGHTS) or path.suffix == ".gguf")
    ]
    if (model_dir / PEFT_CONFIG).is_file():
        problems.append(
            f"{PEFT_CONFIG} is there: transformers loads the PEFT adapter it describes on top of "
            "the model."
        )
    return problems


def _name_recorded(tower: Mapping[str, Any]) -> str:
    source = tower.get("source", "an unnamed source")
    manifest = _mapping(tower, "manifest")
    start = _mapping(manifest, "base_tower").get("reference")
    made = f"{source}"
    if "objective" in manifest:
        teacher = _mapping(manifest, "teacher").get("reference", "an unnamed teacher")
        made += f", aligned from {start} with {teacher}"
    elif start and start != source:
        made += f", made from {start}"
    mix = _mapping(tower, "mix")
    if mix:
        made = f"a mix: {mix.get('weight'):g} of {made}, the rest of the base's own tower"
    return made


def _history(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    history = record.get("history")
    return [e for e in history if isinstance(e, Mapping)] if isinstance(history, list) else []


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {key: value})
    return flat
