"""Tell what a checkpoint is: layout, sizes, release, and how sure each of that is.

Weights are memory-mapped and gone through once for their values and once for their fingerprint.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kuea_mllm.io import read_json
from kuea_mllm.towers.files.checkpoints import is_open_clip_repository, resolve_source
from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.formats.evidence import explain_activation, explain_heads
from kuea_mllm.towers.formats.releases import Clues, RecognisedRelease, recognise
from kuea_mllm.towers.formats.unwrap import refuse_adapter_directory, unmerged_lora_keys
from kuea_mllm.towers.inspecting.findings import (
    Findings,
    read_directory_findings,
    read_file_findings,
    read_open_clip_findings,
)
from kuea_mllm.towers.inspecting.inspect_mllm import inspect_mllm, is_mllm
from kuea_mllm.towers.inspecting.inspection import Inspection
from kuea_mllm.towers.model.fingerprint import fingerprint_state
from kuea_mllm.towers.model.weight_checks import count_non_finite, rounded_to_half

__all__ = ["Inspection", "inspect_source", "rounded_to_half", "unmerged_lora_keys"]

_SIZES = ("image_size", "patch_size", "width", "layers", "mlp_width", "embedding_width")
_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)")
_MANIFEST = "kuea.json"


def inspect_source(source: str | Path) -> Inspection:
    """Tell what a checkpoint file, a model directory or a Hub id is.

    Raises:
        TowerError: If it cannot be read or is of no known layout; adapters (LoRA), other vision
            models and near misses are named.
    """
    path = resolve_source(source)
    if path.is_dir():
        refuse_adapter_directory(path)
        if is_open_clip_repository(path):
            found = read_open_clip_findings(path)
        elif is_mllm(path):
            return inspect_mllm(str(source), path)
        else:
            found = read_directory_findings(path)
    else:
        found = read_file_findings(path)
    return _inspect(str(source), path, found)


def _inspect(source: str, path: Path, found: Findings) -> Inspection:
    shape, warnings = found.shape, []
    fingerprint = fingerprint_state(found.state)
    record = _record(path)
    is_its_own = record is not None and record.get("fingerprint") == fingerprint
    if record is not None and not is_its_own and path.is_dir():
        warnings.append(
            f"kuea.json records the fingerprint {str(record.get('fingerprint'))[:12]}, these "
            f"weights have {fingerprint[:12]}: they were changed since"
        )
    clues = _clues(source, path, found, record if is_its_own else None)
    releases = recognise(clues)
    activation, why_activation = explain_activation(shape, path, releases)
    heads, why_heads = explain_heads(shape, releases)
    if found.stated is not None:
        activation, why_activation = found.stated.activation, [found.stated.why_activation]
        heads, why_heads = found.stated.heads, [found.stated.why_heads]
    warnings += _value_warnings(found, releases)
    if found.stated is None:
        notes = [r for r in releases if r.note and r.confidence != "possible"]
        warnings += [f"{release.name}: {release.note}" for release in notes]
    if found.taken_off:
        warnings.append(f"read without {' and '.join(found.taken_off)}")
    if not shape.has_projection:
        warnings.append(
            "it has no projection: an MLLM can use it, but its embeddings cannot be computed "
            "(alignment, zero-shot)"
        )
    made = found.preprocessing.image_size
    if made not in (None, shape.image_size):
        warnings.append(f"its image processor makes images of {made} pixels")
    counts = Counter(str(t.dtype).removeprefix("torch.") for t in found.state.values())
    return Inspection(
        source=source,
        layout=shape.layout,
        description=shape.description,
        taken_off=found.taken_off,
        family=shape.family,
        sizes={name: getattr(shape, name) for name in _SIZES},
        dtype=shape.dtype,
        dtypes=dict(sorted(counts.items())),
        activation=activation,
        activation_evidence=why_activation,
        heads=heads,
        heads_evidence=why_heads,
        preprocessing={
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(found.preprocessing).items()
            if name in {"mean", "std", "resize"}
        },
        preprocessing_evidence=[found.preprocessing_evidence],
        has_projection=shape.has_projection,
        has_text_tower=_has_text(found.names),
        releases=releases,
        fingerprint=fingerprint,
        provenance=record if is_its_own or path.is_dir() else None,
        warnings=warnings,
    )


def _value_warnings(found: Findings, releases: list[RecognisedRelease]) -> list[str]:
    warnings = []
    count, first = count_non_finite(found.state)
    if count:
        values = "1 value is" if count == 1 else f"{count} values are"
        warnings.append(f"{values} NaN or infinite, the first in {first}: do not use it")
    # Published in half precision, so nothing was lost on the way.
    is_original = any(r.name == "OpenAI CLIP" and r.confidence != "possible" for r in releases)
    half = None if is_original else rounded_to_half(found.state)
    if half:
        warnings.append(
            f"every matrix is stored in {found.shape.dtype} but holds {half} values only: either "
            f"these are original weights that were published in {half} (OpenAI's were, in float16) "
            "or they were rounded on the way. open_clip's loader for OpenAI dicts does that; a "
            "fine-tuned tower loses up to about 1e-3 of its embedding"
        )
    return warnings


def _clues(source: str, path: Path, found: Findings, record: Mapping[str, Any] | None) -> Clues:
    is_hub = not Path(source).exists()
    names = [path.name, *found.called]
    names += ["/".join(match.groups()) for match in _HUB_CACHE.finditer(path.as_posix())]
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    arguments = run / "args.txt"
    is_run = not path.is_dir() and arguments.is_file()
    return Clues(
        shape=found.shape,
        hub_id=source if is_hub else "",
        names=tuple(names),
        keys=found.names,
        dtypes=found.dtypes,
        text_positions=found.text_positions,
        vocabulary=found.vocabulary,
        siblings=frozenset(() if path.is_dir() else (p.name for p in path.parent.iterdir())),
        arguments=arguments.read_text(encoding="utf-8", errors="replace") if is_run else "",
        record=record,
    )


def _record(path: Path) -> dict[str, Any] | None:
    manifest = (path if path.is_dir() else path.parent) / _MANIFEST
    content = read_json(manifest) if manifest.is_file() else None
    return content if isinstance(content, dict) else None


def _has_text(names: frozenset[str]) -> bool:
    return any(
        name == keys.TEXT_KEYS[0] or name.startswith(("text.", "text_model.")) for name in names
    )
