"""Convert a tower from any format to any other, exactly, and prove it before it has a name.

A conversion changes nothing that was not asked for: every tensor keeps its dtype and its bits. What
can be asked for is another dtype, another image size, and a mix with the original tower; each is
named and measured in the report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kuea_mllm.errors import UserError
from kuea_mllm.io import atomic_directory, read_json, require_free_output, write_json
from kuea_mllm.manifest import library_versions, named_source, utc_now
from kuea_mllm.towers.converting.changes import (
    DTYPES,
    Changes,
    apply_changes,
    dtype_names,
    load_original,
)
from kuea_mllm.towers.converting.parity import (
    PROBES,
    ParityReport,
    TowerOutputs,
    compare_outputs,
    outputs_in_own_library,
    outputs_of_tower,
)
from kuea_mllm.towers.converting.probe_images import probe_pixels
from kuea_mllm.towers.files.checkpoints import resolve_source
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.reading.text_half import read_text_half
from kuea_mllm.towers.writing.card import Library, render_card
from kuea_mllm.towers.writing.open_clip_export import read_open_clip_text, save_open_clip
from kuea_mllm.towers.writing.openai_export import export_openai
from kuea_mllm.towers.writing.save import (
    atomic_file,
    require_state_dict_name,
    save_tower,
    save_visual,
    write_state,
)

logger = logging.getLogger(__name__)

__all__ = ["DIRECTORIES", "DTYPES", "FORMATS", "Changes", "Conversion", "convert_tower"]

FORMATS = ("hf", "open_clip", "openai", "visual")
DIRECTORIES = ("hf", "open_clip")

# What load_tower calls each format when it reads it back.
_LAYOUTS = {"hf": "hf_directory", "open_clip": "open_clip_directory", "openai": "openai"}
# Said anew by every conversion; the rest of a source's kuea.json (objective, data, base) is kept.
_SAID_ANEW = {"schema_version", "fingerprint", "spec", "versions", "command", "created"}


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        destination: File or directory that was written.
        layout: Format of the source, a key of `formats.layouts.LAYOUTS`.
        to: Format of the destination.
        fingerprint: Fingerprint of the tower as written.
        dtype: Dtypes of its tensors, joined by "+".
        parity: The comparisons that were made; empty with `check=False`.
        changes: What was changed on request, each with its measured effect.
    """

    destination: Path
    layout: str
    to: str
    fingerprint: str
    dtype: str
    parity: tuple[ParityReport, ...]
    changes: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "destination": str(self.destination),
            "from": self.layout,
            "to": self.to,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "parity": [report.to_dict() for report in self.parity],
            "changes": dict(self.changes),
        }


def convert_tower(
    source: str | Path,
    destination: Path,
    *,
    to: str,
    text_from: str | Path | None = None,
    activation: str | None = None,
    heads: int | None = None,
    changes: Changes | None = None,
    weights: Sequence[float] | None = None,
    check: bool = True,
    command: str | None = None,
) -> list[Conversion]:
    """Write a tower in another format.

    Args:
        source: As for `load_tower`.
        destination: New directory (hf, open_clip) or file (visual, openai).
        to: One of `FORMATS`.
        text_from: Full CLIP whose text half is taken; needed for openai and open_clip, for hf it
            makes a full `CLIPModel`.
        activation: For files that do not state it.
        heads: Likewise.
        changes: What to change beside the format; nothing if left out.
        weights: Several shares of the source in a mix with `changes.original`: `destination`
            becomes a directory of directories named by them, those of the file formats each with
            a `tower.safetensors`. All of them are written, or none.
        check: Compare source and destination in their own libraries before the destination gets
            its name.
        command: Command line to record.

    Returns:
        What was done: one conversion, or one for each of `weights`.

    Raises:
        TowerError: If source or text half cannot be read, the format cannot express the tower, or
            the written tower does not compute the same.
        TowerMismatch: If things do not belong together.
        OutputError: If `destination` exists.
    """
    changes, destination = changes or Changes(), Path(destination)
    _refuse_combinations(to, text_from, changes, weights)
    require_free_output(destination)
    if to not in DIRECTORIES and weights is None:
        require_state_dict_name(destination)
    opened = _Source.open(source, activation, heads, changes, check=check)
    writer = _writer(to, source, text_from, activation)

    def convert(asked: Changes, place: Path) -> Conversion:
        return _convert_one(opened, asked, place, to, writer, command)

    if weights is None:
        return [convert(changes, destination)]
    done = []
    with atomic_directory(destination) as partial:
        for weight in weights:
            name = Path(f"{weight:g}") / ("" if to in DIRECTORIES else "tower.safetensors")
            one = convert(replace(changes, weight=weight), partial / name)
            done.append(replace(one, destination=destination / name))
    return done


@dataclass(frozen=True)
class _Source:
    """A source as it is stored, and what it computes in its own library."""

    name: str
    tower: Tower
    original: Tower | None
    outputs: TowerOutputs | None

    @classmethod
    def open(
        cls,
        source: str | Path,
        activation: str | None,
        heads: int | None,
        changes: Changes,
        *,
        check: bool,
    ) -> _Source:
        tower = load_tower(source, activation=activation, heads=heads, dtype=None)
        original = None
        if changes.original is not None:
            original = load_original(changes.original, tower, activation, heads)
        outputs = None
        if check:
            outputs = outputs_in_own_library(
                resolve_source(source),
                layout=tower.layout,
                spec=tower.spec,
                pixels=probe_pixels(tower.spec, count=PROBES),
            )
        return cls(str(source), tower, original, outputs)


_Writer = Callable[[Tower, Path, dict[str, Any]], None]


def _convert_one(
    source: _Source,
    changes: Changes,
    destination: Path,
    to: str,
    writer: _Writer,
    command: str | None,
) -> Conversion:
    tower, made = apply_changes(source.tower, source.original, changes)
    if to not in DIRECTORIES and tower.spec.image_size % tower.spec.patch_size:
        logger.warning(
            "%s takes %d pixels, which no state dict states: readers will take %d. Give them "
            "--image-size %d.",
            tower.source,
            tower.spec.image_size,
            tower.spec.grid * tower.spec.patch_size,
            tower.spec.image_size,
        )
    layout = _LAYOUTS.get(to) or ("visual" if tower.spec.family == "clip" else "trunk")
    parity: list[ParityReport] = []
    # A state dict has no place for it.
    manifest = _manifest(source, tower, to, made, command) if to in DIRECTORIES else {}
    with _atomic(destination, to) as partial:
        writer(tower, partial, manifest)
        if source.outputs is not None:
            parity = _prove(source.tower, source.outputs, tower, partial, layout)
            if to in DIRECTORIES:
                _record(partial, [report.to_dict() for report in parity])
    return Conversion(
        destination,
        source.tower.layout,
        to,
        tower.fingerprint,
        dtype_names(tower.canonical_state()),
        tuple(parity),
        made,
    )


def _prove(
    source: Tower, computed: TowerOutputs, tower: Tower, written: Path, layout: str
) -> list[ParityReport]:
    """Compare what was written with where it comes from, and raise if they differ."""
    pixels = probe_pixels(tower.spec, count=PROBES)
    found = outputs_in_own_library(written, layout=layout, spec=tower.spec, pixels=pixels)
    if tower is source:
        reports = [compare_outputs(computed, found, names=("source", "destination"))]
    else:
        # Two steps, because the source itself computes something else than what was asked for.
        read = outputs_of_tower(source, probe_pixels(source.spec, count=PROBES))
        asked = outputs_of_tower(tower, pixels)
        reports = [
            compare_outputs(computed, read, names=("source", "source as read")),
            compare_outputs(asked, found, names=("tower as changed", "destination")),
        ]
    for report in reports:
        report.require_same()
    return reports


def _writer(
    to: str, source: str | Path, text_from: str | Path | None, activation: str | None
) -> _Writer:
    """Return what writes a tower in a format; the text half is read once."""
    # A state dict states no activation: that of the same file holds for both of its halves.
    stated = activation if text_from is not None and _is_same(source, text_from) else None
    if to == "visual":
        return lambda tower, path, _: save_visual(tower, path)
    if to == "hf" or text_from is None:
        half = None if text_from is None else read_text_half(text_from, activation=stated)
        return lambda tower, path, manifest: save_tower(tower, path, manifest=manifest, text=half)
    if to == "open_clip":
        text = read_open_clip_text(text_from, activation=stated)
        return lambda tower, path, manifest: save_open_clip(tower, text, path, manifest=manifest)
    openai = read_text_half(text_from, activation=stated)
    return lambda tower, path, _: write_state(export_openai(tower, openai), path)


def _is_same(source: str | Path, other: str | Path) -> bool:
    return str(source) == str(other) or (
        Path(source).exists() and Path(other).exists() and Path(source).samefile(other)
    )


@contextmanager
def _atomic(destination: Path, to: str) -> Iterator[Path]:
    opened = atomic_directory if to in DIRECTORIES else atomic_file
    with opened(destination) as partial:
        yield partial


def _manifest(
    source: _Source, tower: Tower, to: str, made: Mapping[str, Any], command: str | None
) -> dict[str, Any]:
    """Return kuea.json: what the source's said about its making, and this conversion."""
    inherited = {k: v for k, v in (source.tower.manifest or {}).items() if k not in _SAID_ANEW}
    origin = {
        **named_source(source.name),
        "layout": source.tower.layout,
        "fingerprint": source.tower.fingerprint,
    }
    return {
        "kind": "tower",
        "base_tower": origin,
        **inherited,
        "conversion": {
            **origin,
            "to": to,
            "dtype": dtype_names(tower.canonical_state()),
            "changes": dict(made),
        },
        "versions": library_versions(),
        "command": command,
        "created": utc_now(),
    }


def _record(directory: Path, parity: list[dict[str, Any]]) -> None:
    """Add the comparison to kuea.json and to the card."""
    path = directory / "kuea.json"
    record = read_json(path)
    record["conversion"]["parity"] = parity
    write_json(path, record)
    library: Library = "open_clip" if record["conversion"]["to"] == "open_clip" else "transformers"
    card = render_card(record, library=library)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _refuse_combinations(
    to: str,
    text_from: str | Path | None,
    changes: Changes,
    weights: Sequence[float] | None,
) -> None:
    if to not in FORMATS:
        raise UserError(f"there is no format {to!r}.", f"Known are: {', '.join(FORMATS)}.")
    if to in {"openai", "open_clip"} and text_from is None:
        raise UserError(
            f"--to {to} needs --text-from FULL_CLIP: the format holds both halves of a model.",
            "Give the CLIP that the tower was made from.",
        )
    if to == "visual" and text_from is not None:
        raise UserError("--to visual holds no text tower.", "Leave out --text-from.")
    if changes.dtype is not None and changes.dtype not in DTYPES:
        raise UserError(
            f"there is no dtype {changes.dtype!r} to write.", f"Known are: {', '.join(DTYPES)}."
        )
    asked = [changes.weight] if weights is None else weights
    for weight in asked:
        if not 0.0 <= weight <= 1.0:
            raise UserError(f"--interpolate {weight:g} is no number from 0 to 1.")
    if len({f"{weight:g}" for weight in asked}) < len(asked):
        raise UserError("--interpolate names a weight twice.")
    if changes.original is None and (weights is not None or changes.weight != 1.0):
        raise UserError(
            "--interpolate mixes two towers, and only one was given.",
            "Give the tower that SOURCE was made from with --original.",
        )
