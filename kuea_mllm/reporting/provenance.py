"""Where models come from, side by side, with what differs marked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json
from kuea_mllm.reporting.blocks import Block, Cell, Details, Paragraph, Table
from kuea_mllm.reporting.text import clean, value_text

# What says least about a model, and is long.
_SKIPPED = frozenset(
    ("base_card", "history", "compatibility", "schema_version", "tensors", "groups")
)
_MAIN = (
    ("Directory", ("model", "path")),
    ("Adapter", ("model", "adapter")),
    ("Fingerprint of the vision tower in use", ("model", "tower_fingerprint")),
    ("Tower", ("record", "tower", "source")),
    ("Tower: image size", ("record", "tower", "spec", "image_size")),
    ("Tower: aligned from", ("record", "tower", "manifest", "base_tower", "reference")),
    ("Tower: teacher", ("record", "tower", "manifest", "teacher", "reference")),
    ("Tower: trained on", ("record", "tower", "manifest", "data", "trained_on")),
    ("Tower: share of the mix", ("record", "tower", "mix", "weight")),
    ("Base", ("record", "base", "reference")),
    ("Fingerprint before the swap", ("record", "replaced", "fingerprint_before")),
    ("LoRA weights", ("record", "tuned", "weights")),
    ("LoRA: rank", ("record", "tuned", "record", "lora", "rank")),
    ("LoRA: alpha", ("record", "tuned", "record", "lora", "alpha")),
    ("LoRA: numbers trained", ("record", "tuned", "record", "trained", "trainable")),
    ("LoRA: steps", ("record", "tuned", "record", "steps")),
    ("LoRA: data", ("record", "tuned", "record", "data", "file")),
    ("Command that made the model", ("record", "command")),
    ("Model made", ("record", "created")),
    ("Command of the evaluation", ("command",)),
    ("Evaluated", ("created",)),
)
_SAME, _DIFFERENT = "same", "≠ differs"


def models_blocks(models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Block]:
    """Set models side by side: what matters as a table, everything recorded folded away.

    Args:
        models: Name and `summary.json` of each.
    """
    summaries = [_with_record(summary) for _, summary in models]
    names = [name for name, _ in models]
    main = [
        (label, [_at(summary, path) for summary in summaries])
        for label, path in _MAIN
        if any(_at(summary, path) is not None for summary in summaries)
    ]
    blocks: list[Block] = [_side_by_side("What was compared.", names, main)]
    without = [name for name, found in zip(names, summaries, strict=True) if not found["record"]]
    if without:
        blocks.append(
            Paragraph(
                f"No record (kuea.json) of {', '.join(without)}: an untouched base, or a directory "
                "that is not on this machine.",
                "note",
            )
        )
    run: list[tuple[str, list[Any]]] = [("seconds", [one.get("seconds") for one in summaries])]
    run += [
        (f"{part}: {key}", values)
        for part in ("settings", "versions")
        for key, values in _flattened([summary.get(part) or {} for summary in summaries])
    ]
    table = _side_by_side("How the evaluations were run.", names, run)
    blocks.append(Details("Settings and versions", [table]))
    recorded = _flattened([summary["record"] for summary in summaries])
    if recorded:
        table = _side_by_side("Everything that the models' kuea.json records.", names, recorded)
        blocks.append(Details("Everything recorded about the models", [table]))
    return blocks


def model_record(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a model's `kuea.json` said: as the results keep it, else from its directory.

    The file counts only if it still names the tower that answered.
    """
    kept = summary.get("model_record")
    if isinstance(kept, Mapping):
        return kept
    model = summary.get("model") or {}
    try:
        record = read_json(Path(str(model.get("path"))) / "kuea.json")
    except (OSError, UserError):
        return {}
    fingerprints = _at(record, ("tower", "fingerprints"))
    known = list(fingerprints.values()) if isinstance(fingerprints, Mapping) else []
    return record if model.get("tower_fingerprint") in known else {}


def _with_record(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {**summary, "record": model_record(summary)}


def _side_by_side(
    caption: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]]
) -> Table:
    """Make a table of names and values; with several models its second column says what differs."""
    if len(names) == 1:
        cells: list[list[str | Cell]] = [[label, _text(values[0])] for label, values in rows]
        return Table(caption, ("What", *names), cells, breaks=True)
    cells = []
    for label, values in rows:
        texts = [_text(value) for value in values]
        differs = len(set(texts)) > 1
        mark = Cell(_DIFFERENT, "differs") if differs else Cell(_SAME, "unclear")
        cells.append([label, mark, *texts])
    cells.sort(key=lambda row: isinstance(row[1], Cell) and row[1].text == _SAME)
    return Table(
        f"{caption} What differs comes first.", ("What", "Compared", *names), cells, breaks=True
    )


def _text(value: object) -> str:
    if value is None:
        return "–"  # noqa: RUF001 - a dash, meant as one
    return value_text(value)


def _at(record: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = record
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _flattened(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    flat = [_flat("", record) for record in records]
    return [
        (key, [one.get(key) for one in flat])
        for key in dict.fromkeys(key for one in flat for key in one)
    ]


def _flat(prefix: str, record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if key in _SKIPPED or value is None:
            continue
        name = f"{prefix}{clean(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            flat.update(_flat(f"{name}: ", value))
        else:
            flat[name] = json.dumps(value) if _is_nested(value) else value
    return flat


def _is_nested(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
