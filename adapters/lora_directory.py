"""Directories of LoRA weights in PEFT's format: what is in them, every tensor accounted for.

Read as files, so that a merge or a conversion builds no model. Whatever PEFT can write and would
make W + scale * B A wrong is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.adapters.lora_card import render_lora_card
from kuea_mllm.adapters.records import PEFT_CONFIG, RECORD_FILE, read_record
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json, write_json, write_text
from kuea_mllm.model_card import CARD_FILE
from kuea_mllm.towers.files.shards import as_planned, open_shard, write_safetensors

LORA = "lora"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
# What PEFT puts before the names of the model it wraps.
PREFIX = "base_model.model."

_A, _B = ".lora_A.weight", ".lora_B.weight"
# What the original LLaVA saves beside LoRA; its layers have other names than ours.
_AUTHORS_FILE = "non_lora_trainables.bin"
_UNFINISHED = (".unfinished", ".diverged")
# Without effect on what the weights mean, or read below.
_KNOWN = {
    *("peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("auto_mapping", "peft_version", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights", "eva_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_NEUTRAL: tuple[Any, ...] = (None, False, "none", {}, [])
# Others (PiSSA, OLoRA, LoftQ ...) change the base's own weights before training.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one layer.

    Attributes:
        a: Name of A, (rank, inputs), in the weight file.
        b: Name of B, (outputs, rank).
        scale: What B A is multiplied with.
    """

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class LoraDirectory:
    """What a directory of LoRA weights holds.

    Attributes:
        path: The directory.
        config: Content of `adapter_config.json`.
        record: Content of `kuea.json`, empty without one.
        tensors: All tensors by their names in the file, read when asked for.
        pairs: Path of a layer in the model -> its matrices.
        whole: Name of a tensor in the model -> name in the file, of what was trained as a whole.
    """

    path: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    pairs: Mapping[str, LoraPair]
    whole: Mapping[str, str]


def is_lora_directory(path: Path) -> bool:
    """Say whether a directory holds LoRA weights, or is the output of `lora` with some inside."""
    return any((Path(path) / part / PEFT_CONFIG).is_file() for part in (".", "adapter"))


def find_lora_directory(path: Path) -> Path:
    """Return the directory of the weights: the given one, or `adapter/` inside of a run's output.

    Raises:
        UserError: If there are no LoRA weights, or the run that writes them is not finished.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"directory {path} does not exist.",
            f"Its run may be unfinished: {path.name}.unfinished is there."
            if path.with_name(f"{path.name}.unfinished").is_dir()
            else "Give the adapter/ of what `kuea-mllm lora` wrote, or any PEFT LoRA directory.",
        )
    for part in (path.absolute(), *path.absolute().parents):
        if part.name.endswith(_UNFINISHED) or ".partial-" in part.name:
            raise UserError(
                f"{path} is no finished result: it lies in {part.name}.",
                "Go on with the run that writes it (--resume), and take its output.",
            )
    if (path / _AUTHORS_FILE).is_file():
        raise UserError(
            f"{path} holds LoRA weights in the layout of LLaVA's authors ({_AUTHORS_FILE}).",
            "Convert them first: kuea-mllm convert DIR NEW --mllm llava.",
        )
    for found in (path, path / "adapter"):
        if (found / PEFT_CONFIG).is_file():
            return found
    raise UserError(
        f"{path} is no directory of LoRA weights: it has no {PEFT_CONFIG}.",
        "Give the adapter/ of what `kuea-mllm lora` wrote, or any PEFT LoRA directory.",
    )


def read_lora_directory(path: Path) -> LoraDirectory:
    """Read what a directory of LoRA weights holds, and make sure that all of it is understood.

    Args:
        path: The directory, or the output of `lora` with `adapter/` inside.

    Raises:
        UserError: If it is none, is incomplete, or asks for anything but LoRA as such.
    """
    return open_lora_directory(find_lora_directory(path))


def open_lora_directory(path: Path) -> LoraDirectory:
    """Read a directory that need not have its final name yet; see `read_lora_directory`."""
    config = _read_config(path)
    tensors = _open_weights(path)
    pairs = _pairs(tensors, config, path)
    used = {name for pair in pairs.values() for name in (pair.a, pair.b)}
    whole = _whole(tensors.keys() - used, config, path)
    return LoraDirectory(path, config, read_record(path), tensors, pairs, whole)


def describe_lora_directory(path: Path) -> dict[str, Any]:
    """Say what LoRA weights are, for people: JSON values.

    Raises:
        UserError: As `read_lora_directory`.
    """
    found = read_lora_directory(path)
    base = found.record.get("base")
    reference = base.get("reference") if isinstance(base, Mapping) else None
    tower = base.get("vision_tower") if isinstance(base, Mapping) else None
    return {
        "layout": "LoRA weights (peft)",
        "base": reference or found.config.get("base_model_name_or_path") or "not named",
        "vision tower of the base": tower or "not recorded",
        "rank": found.config["r"],
        "alpha": found.config["lora_alpha"],
        **describe_tensors(found.tensors),
        "made by": found.record.get("command") or "not recorded",
    }


def write_lora_directory(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
) -> None:
    """Write LoRA weights with their card and record into an existing directory.

    Args:
        directory: May be `io.atomic_directory`'s.
        config: Content of `adapter_config.json`.
        tensors: By the names that PEFT reads; written in the dtype they have.
        manifest: Content of `kuea.json`.
    """
    write_safetensors(
        directory / WEIGHTS_FILE, {name: as_planned(tensors[name]) for name in sorted(tensors)}
    )
    write_json(directory / PEFT_CONFIG, dict(config))
    write_json(directory / RECORD_FILE, dict(manifest))
    write_text(directory / CARD_FILE, render_lora_card(manifest))


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Count what a directory of LoRA weights holds, for its record."""
    lora = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    whole = {name: tensor for name, tensor in tensors.items() if name not in lora}
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return {
        "lora_layers": sum(".lora_A." in name for name in lora),
        "lora_parameters": sum(tensor.numel() for tensor in lora.values()),
        "whole": sorted(whole),
        "whole_parameters": sum(tensor.numel() for tensor in whole.values()),
        "dtype": "+".join(dtypes),
    }


def scale_of(config: Mapping[str, Any], layer: str, rank: int, where: Path) -> float:
    """Return what B A of a layer is multiplied with, as PEFT computes it.

    Raises:
        UserError: If the configuration states another rank than the matrices have.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    stated = ranks.get(_pattern(ranks, layer), config.get("r"))
    if stated != rank:
        raise UserError(
            f"{where}: the matrices of {layer} have rank {rank}, {PEFT_CONFIG} says {stated}.",
            "Configuration and weights do not belong together; restore the directory.",
        )
    alpha = float(alphas.get(_pattern(alphas, layer), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(path: Path) -> Mapping[str, Any]:
    config = read_json(path / PEFT_CONFIG)
    where = path / PEFT_CONFIG
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{where} is of type {kind!r}, not LORA.", "Only LoRA weights are taken.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or isinstance(config[key], bool):
            raise UserError(f"{where}: {key} is {config.get(key)!r}, not a number.")
    if config.get("use_dora"):
        raise UserError(
            f"{where}: use_dora is set. DoRA rescales whole weights, which W + scale * B A is not.",
            "Merge it with PEFT's merge_and_unload().",
        )
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        raise UserError(
            f"{where}: init_lora_weights is {start!r}, which changes the base's own weights before "
            "training, so that these matrices do not belong to the base on disk.",
            "Convert it with PEFT (path_initial_model_for_weight_conversion) first.",
        )
    for key, value in config.items():
        if key not in _KNOWN and key != "use_dora" and value not in _NEUTRAL:
            raise UserError(
                f"{where}: {key} is {value!r}, which is more than LoRA.",
                "Only plain LoRA (also rank-stabilised, with patterns of rank and alpha) is taken.",
            )
    return config


def _open_weights(path: Path) -> Mapping[str, Tensor]:
    found = [path / name for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE)]
    for file in found:
        if file.is_file():
            return open_shard(file)
    raise UserError(
        f"{path} holds no LoRA weights: neither {WEIGHTS_FILE} nor {PICKLED_WEIGHTS_FILE} is "
        "there.",
        "The directory is incomplete; write or download it again.",
    )


def _pairs(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: Path
) -> dict[str, LoraPair]:
    pairs = {}
    for a in sorted(name for name in tensors if name.endswith(_A)):
        layer = _in_model(a.removesuffix(_A), where)
        b = a.removesuffix(_A) + _B
        if b not in tensors:
            raise UserError(f"{where}: {a} is there, {b} is not.", "Restore the directory.")
        rank, other = tensors[a].shape[0], tensors[b].shape[-1]
        if tensors[a].ndim != 2 or tensors[b].ndim != 2 or rank != other or not rank:
            raise UserError(
                f"{where}: {a} has shape {tuple(tensors[a].shape)}, {b} "
                f"{tuple(tensors[b].shape)}: their ranks do not agree.",
                "They may be parts of a sharded model; save it again after gathering.",
            )
        pairs[layer] = LoraPair(a, b, scale_of(config, layer, rank, where))
    if not pairs:
        raise UserError(f"{where} holds no LoRA matrices: no tensor is named *{_A}.")
    return pairs


def _whole(names: Iterable[str], config: Mapping[str, Any], where: Path) -> dict[str, str]:
    saved = config.get("modules_to_save") or []
    whole = {}
    for name in sorted(names):
        target = _in_model(name, where)
        modules = (f".{target}".partition(f".{module}.")[1] for module in saved)
        if "lora_" in name or not any(modules):
            raise UserError(
                f"{where}: tensor {name} is neither a LoRA matrix of a linear layer nor part of a "
                f"module that {PEFT_CONFIG} lists as modules_to_save.",
                "Only LoRA of linear layers and modules trained as a whole are taken.",
            )
        whole[target] = name
    return whole


def _in_model(name: str, where: Path) -> str:
    if not name.startswith(PREFIX):
        raise UserError(
            f"{where}: tensor {name} is not named as PEFT names it ({PREFIX}*).",
            "A LLaVA adapter in its authors' layout is converted first: "
            "`kuea-mllm convert DIR NEW --mllm llava`.",
        )
    return name.removeprefix(PREFIX)


def _pattern(patterns: Iterable[str], layer: str) -> str:
    """Return the pattern that PEFT would take for a layer; the layer itself if none fits."""
    fitting = (key for key in patterns if re.match(rf"(.*\.)?({key})$", layer))
    return next(fitting, layer)
