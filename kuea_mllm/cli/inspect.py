"""`kuea-mllm convert SOURCE --inspect`: tell what a source is, and what that rests on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kuea_mllm.cli.common import print_json

if TYPE_CHECKING:
    from kuea_mllm.towers.inspecting.inspect import Inspection


def print_inspection(source: str, json_output: bool) -> None:
    """Print what a checkpoint file, a model directory or a Hub id is; nothing is written.

    Raises:
        TowerError: If it cannot be read or is of no known layout.
    """
    from kuea_mllm.adapters.lora_directory import is_lora_directory

    if is_lora_directory(Path(source)):
        _print_lora(Path(source), json_output)
        return
    from kuea_mllm.towers.inspecting.inspect import inspect_source

    found = inspect_source(source)
    if json_output:
        print_json(found.to_dict())
        return
    from kuea_mllm.reporting.tables import print_key_values

    print_key_values(source, inspection_rows(found))
    if found.fingerprint:
        # Beside a label in a frame, it would be broken in a terminal of 80 columns.
        typer.echo(f"fingerprint {found.fingerprint}")
    for warning in found.warnings:
        typer.secho("warning: ", fg=typer.colors.YELLOW, bold=True, nl=False)
        typer.echo(warning)


def _print_lora(source: Path, json_output: bool) -> None:
    from kuea_mllm.adapters.lora_directory import describe_lora_directory

    found = describe_lora_directory(source)
    if json_output:
        print_json(found)
        return
    from kuea_mllm.reporting.tables import print_key_values

    print_key_values(str(source), {name: str(value) for name, value in found.items()})


def inspection_rows(found: Inspection) -> dict[str, str]:
    """Return an inspection as names and values for people, evidence in brackets."""
    rows = {"layout": f"{found.description} ({found.layout})"}
    if found.family:
        rows["family"] = found.family
    if found.sizes:
        rows["sizes"] = ", ".join(
            f"{name.replace('_', ' ')} {size}" for name, size in found.sizes.items()
        )
    counts = ", ".join(f"{count} tensors {name}" for name, count in found.dtypes.items())
    if found.dtype:
        rows["dtype"] = f"{found.dtype} ({counts})" if counts else found.dtype
    rows["activation"] = _with_evidence(found.activation, found.activation_evidence)
    rows["heads"] = _with_evidence(found.heads, found.heads_evidence)
    if found.preprocessing:
        stated = ", ".join(f"{name} {value}" for name, value in found.preprocessing.items())
        rows["pixels"] = _with_evidence(stated, found.preprocessing_evidence)
    if found.layout != "mllm_directory":
        rows["projection"] = "present" if found.has_projection else "absent"
        rows["text tower"] = "present" if found.has_text_tower else "absent"
        rows["looks like"] = "; or ".join(
            f"{release.name} ({release.confidence}: {release.evidence})"
            for release in found.releases
        ) or ("no release that is known here")
    if found.provenance is not None:
        kept = ("kind", "base_tower", "base", "tower", "created", "command")
        rows["kuea.json"] = ", ".join(
            f"{name} {_reference(found.provenance[name])}"
            for name in kept
            if name in found.provenance
        )
    return rows


def _reference(value: Any) -> Any:
    """Return what a record calls a tower or base; its fingerprints are for `--json`."""
    if not isinstance(value, dict):
        return value
    return next((value[key] for key in ("reference", "source", "path") if key in value), value)


def _with_evidence(value: object, evidence: list[str]) -> str:
    why = "; ".join(evidence)
    if value is None:
        return f"unknown: {why}"
    return f"{value} ({why})" if why else str(value)
