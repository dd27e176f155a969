"""Finds adapters through the entry-point group `kuea_mllm.adapters` (no torch at import)."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NoReturn

from kuea_mllm.adapters.base import AdapterManifest, MLLMAdapter
from kuea_mllm.adapters.records import PEFT_CONFIG
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json

LOGGER = logging.getLogger("kuea_mllm")

GROUP = "kuea_mllm.adapters"


def list_manifests() -> list[AdapterManifest]:
    """Return the manifests of all usable adapters, sorted by name.

    A package whose entry point is broken is left out here; `broken_adapters` tells about it.
    """
    return [manifest for _, manifest in sorted(_discover()[0].items())]


def broken_adapters() -> dict[str, str]:
    """Return what is wrong with each adapter that was found but cannot be listed, by name."""
    return _discover()[1]


def get_adapter(name: str) -> MLLMAdapter:
    """Load an adapter by name.

    Raises:
        UserError: If there is no such adapter (with the nearest names), or it is broken.
    """
    usable, broken = _discover()
    if name in usable:
        return usable[name].load()
    if name in broken:
        raise UserError(
            f"adapter {name!r} cannot be used: {broken[name]}.",
            "Repair or uninstall the package that provides it.",
        )
    known = sorted(usable | broken)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if not known:
        remedy = "None is installed; install kuea-mllm with pip so that its adapters are found."
    elif near:
        remedy = f"Did you mean {' or '.join(near)}? Installed: {', '.join(known)}."
    else:
        remedy = f"Installed: {', '.join(known)}."
    raise UserError(f"there is no adapter named {name!r}.", remedy)


def adapter_for(model_dir: Path) -> MLLMAdapter:
    """Find the adapter that recognises a model directory by its `config.json`.

    Fallback adapters are loaded and asked only where no other one recognises it.

    Raises:
        UserError: If the directory has no configuration or no single adapter recognises it.
    """
    config = read_model_config(model_dir)
    usable, _ = _discover()
    problems: list[str] = []
    for is_fallback in (False, True):
        manifests = [usable[name] for name in sorted(usable)]
        asked = [manifest for manifest in manifests if manifest.is_fallback == is_fallback]
        matches = _recognising(asked, config, problems)
        if len(matches) > 1:
            names = ", ".join(adapter.name for adapter in matches)
            raise UserError(
                f"{model_dir} is recognised by several adapters: {names}.",
                "Choose one by its name.",
            )
        if matches:
            if is_fallback and problems:
                LOGGER.warning(
                    "adapter %s is used for %s; these failed before they could be asked: %s",
                    matches[0].name,
                    model_dir,
                    "; ".join(problems),
                )
            return matches[0]
    failed = f" These adapters failed: {'; '.join(problems)}." if problems else ""
    if "auto_map" in config:
        failed = f" It brings its own code (auto_map), which is never run.{failed}"
    raise UserError(
        f"no adapter recognises {model_dir} (model_type {config.get('model_type')!r}).{failed}",
        f"Installed: {', '.join(sorted(usable)) or 'none'}. "
        "Give the directory of a supported MLLM, or install an adapter for this one.",
    )


def _recognising(
    manifests: Sequence[AdapterManifest], config: Mapping[str, object], problems: list[str]
) -> list[MLLMAdapter]:
    matches: list[MLLMAdapter] = []
    for manifest in manifests:
        try:
            adapter = manifest.load()
            if adapter.recognises(config):
                matches.append(adapter)
        # One broken package must not hide the adapters that work.
        except Exception as error:
            problems.append(f"{manifest.name} ({error})")
    return matches


def read_model_config(model_dir: Path) -> Mapping[str, object]:
    """Read the `config.json` of a model directory.

    Raises:
        UserError: If the directory or the file is missing or is not a JSON object.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise UserError(
            f"model directory {model_dir} does not exist.",
            "Give the path of a local Hugging Face model directory.",
        )
    if not (model_dir / "config.json").is_file():
        _refuse_other_directory(model_dir)
    config = read_json(model_dir / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"file {model_dir / 'config.json'} does not hold a JSON object.")
    return config


def _refuse_other_directory(path: Path) -> NoReturn:
    # `kuea-mllm lora` leaves a run with its weights in `adapter/`.
    if any((folder / PEFT_CONFIG).is_file() for folder in (path, path / "adapter")):
        raise UserError(
            f"{path} holds LoRA weights, not a model.",
            f"Merge them first: `kuea-mllm merge {path} MERGED`, and give MERGED.",
        )
    raise UserError(
        f"file {path / 'config.json'} is missing.",
        "Give the path of a local Hugging Face model directory.",
    )


def _discover() -> tuple[dict[str, AdapterManifest], dict[str, str]]:
    usable: dict[str, AdapterManifest] = {}
    broken: dict[str, str] = {}
    sources: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        # An editable install next to a wheel lists the same entry twice.
        if sources.get(entry.name) == entry.value:
            continue
        if entry.name in sources:
            usable.pop(entry.name, None)
            broken[entry.name] = f"both {sources[entry.name]} and {entry.value} claim the name"
            continue
        sources[entry.name] = entry.value
        outcome = _load_manifest(entry)
        if isinstance(outcome, AdapterManifest):
            usable[entry.name] = outcome
        else:
            broken[entry.name] = outcome
    return usable, broken


def _load_manifest(entry: EntryPoint) -> AdapterManifest | str:
    try:
        manifest = entry.load()
    # Importing a third party's module may fail in any way.
    except Exception as error:
        return f"loading {entry.value} raised {type(error).__name__}: {error}"
    if not isinstance(manifest, AdapterManifest):
        return f"{entry.value} is not an AdapterManifest"
    if manifest.name != entry.name:
        return f"its manifest calls itself {manifest.name!r}"
    return manifest
