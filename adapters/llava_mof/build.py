"""Makes a directory with mixed image tokens of a LLaVA-1.5 and a DINOv2.

The files of the LLaVA stay as they are (hard links where the file system allows it); the second
encoder gets a file of its own. The result is a start for training, not a model that answers well:
its projector has seen CLIP's tokens only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.import_card import render_import_card
from kuea_mllm.adapters.llava.adapter import LlavaAdapter, resolve_config
from kuea_mllm.adapters.llava_mof.configuration import EXPERTS, MODEL_TYPE
from kuea_mllm.adapters.records import RECORD_FILE, SWAPPED, describe_slot, read_record
from kuea_mllm.errors import OutputError, TowerMismatch, UserError
from kuea_mllm.io import atomic_directory, require_free_output, write_json, write_text
from kuea_mllm.manifest import SCHEMA_VERSION, library_versions, utc_now
from kuea_mllm.model_card import CARD_FILE, base_card_metadata
from kuea_mllm.model_files import INDEX_FILE, SINGLE_FILE, tensor_entries, weight_files
from kuea_mllm.teachers.load import load_teacher
from kuea_mllm.teachers.teacher import Teacher
from kuea_mllm.towers.files.model_copy import copy_file, files_of, take_over, try_link
from kuea_mllm.towers.files.shards import as_planned, open_shard, write_safetensors
from kuea_mllm.towers.formats.locate import expected_shapes, locate_tensors
from kuea_mllm.towers.model.fingerprint import fingerprint_all

LOGGER = logging.getLogger("kuea_mllm")

EXPERT_FILE = "model-expert.safetensors"
CLIP_SHARE = 0.5

_MODULE = "kuea_mllm.adapters.llava_mof.modeling"
_CLASS = "LlavaMofForConditionalGeneration"
_RENAMED = "model-llava.safetensors"
_CHANGES = (
    "The weights of CLIP tower, language model and projector keep their values and dtype; a DINOv2 "
    "was added, and the model has to be tuned before it answers well."
)


def build_mixture(
    source: Path,
    destination: Path,
    *,
    expert: str | None,
    command: str | None = None,
    clip_share: float = CLIP_SHARE,
) -> None:
    """Write a LLaVA with mixed image tokens.

    Args:
        source: LLaVA-1.5 directory in Hugging Face form.
        destination: Directory to create.
        expert: DINOv2 with or without registers: directory or Hub id.
        command: Command line to record.
        clip_share: Share of CLIP's tokens; may be changed in config.json later.

    Raises:
        UserError: If an input is incomplete or of another kind, or `destination` exists.
        EnvironmentFailure: If the disk is full.
    """
    source, destination = Path(source), Path(destination)
    require_free_output(destination)
    if destination.resolve().is_relative_to(source.resolve()):
        raise OutputError(
            f"output {destination} lies inside of the source {source}.", "Choose another place."
        )
    if expert is None:
        raise UserError(
            "a mixed LLaVA needs a second encoder.",
            "Give --tower: a DINOv2, such as facebook/dinov2-large.",
        )
    llava = LlavaAdapter()
    config = resolve_config(source)
    llava.check_base(source)
    slot = llava.tower_slot(source)
    if slot.family != "clip" or not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"{source} reads a {slot.family} tower at the layers {config.vision_feature_layer}; "
            "tokens are mixed with those of one layer of a CLIP tower.",
            "Give a LLaVA-1.5.",
        )
    entries = tensor_entries(source)
    _, places = locate_tensors(
        entries,
        expected_shapes(slot.family, slot.vision_config),
        module=slot.module,
        where=str(source),
    )
    tower: Mapping[str, Tensor] = {
        name: open_shard(source / entry.file)[entry.name] for name, entry in places.items()
    }
    second = _load_expert(expert)
    with atomic_directory(destination) as partial:
        files = _copy(source, partial)
        state = _expert_state(second, config, next(iter(tower.values())).dtype, expert)
        write_safetensors(partial / EXPERT_FILE, {k: as_planned(t) for k, t in state.items()})
        weight_map = {name: files[entry.file] for name, entry in entries.items()}
        weight_map |= dict.fromkeys(state, EXPERT_FILE)
        size = sum((partial / name).stat().st_size for name in set(weight_map.values()))
        write_json(
            partial / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
        write_json(
            partial / "config.json",
            {
                **config.to_dict(),
                "model_type": MODEL_TYPE,
                "architectures": [_CLASS],
                "expert_config": second.model.config.to_dict(),  # type: ignore[union-attr,operator]
                "clip_share": clip_share,
                "expert_feature_layer": -1,
                "clip_mean": list(slot.mean or ()) or None,
                "clip_std": list(slot.std or ()) or None,
                "expert_mean": list(second.mean),
                "expert_std": list(second.std),
            },
        )
        record = _record(source, tower, second, describe_slot(slot), clip_share, command)
        write_json(partial / RECORD_FILE, record)
        card = render_import_card(record, loader=_CLASS, loader_module=_MODULE, changes=_CHANGES)
        write_text(partial / CARD_FILE, card)
        _read_back(partial)
    LOGGER.info(
        "%s mixes %g of CLIP and %g of %s (clip_share in config.json); tune it before it is asked.",
        destination,
        clip_share,
        1 - clip_share,
        expert,
    )


def _load_expert(expert: str) -> Teacher:
    found = load_teacher(expert)
    if found.model_type not in EXPERTS:
        raise TowerMismatch(
            f"{expert} is a {found.model_type}; the second encoder is one of {', '.join(EXPERTS)}.",
            "Give a DINOv2 of transformers, such as facebook/dinov2-large.",
        )
    return found


def _expert_state(
    second: Teacher, config: Any, dtype: torch.dtype, expert: str
) -> dict[str, Tensor]:
    settings: Any = second.model.config
    state = {f"model.expert_tower.{k}": v for k, v in second.model.state_dict().items()}
    width = config.vision_config.hidden_size
    if settings.hidden_size != width:
        LOGGER.info(
            "%s is %d wide, CLIP %d: a linear map between them is added, which has to be trained.",
            expert,
            settings.hidden_size,
            width,
        )
        weight = torch.empty(width, settings.hidden_size)
        torch.nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(0))
        state["model.expert_projection.weight"] = weight
    rounded = {name: tensor.detach().to(dtype) for name, tensor in state.items()}
    for name, tensor in rounded.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TowerMismatch(
                f"{name} of {expert} has values that {dtype} of the model cannot hold.",
                "Give a LLaVA in float32 or bfloat16.",
            )
    return rounded


def _copy(source: Path, partial: Path) -> dict[str, str]:
    """Take over all files but the index; return the new name of each weight file."""
    loaded = weight_files(source)
    # A single file of the usual name would win over the index that the second encoder needs.
    names = {name: _RENAMED if name == SINGLE_FILE else name for name in loaded}
    done: dict[str, list[str]] = {"copied": [], "left_out": []}
    for name, file in files_of(source):
        if name in names:
            target = partial / names[name]
            if not try_link(file, target):
                copy_file(file, target)
        elif name not in {INDEX_FILE, "config.json", CARD_FILE}:
            take_over(name, file, partial, done)
    return names


def _record(
    source: Path,
    tower: Mapping[str, Tensor],
    second: Teacher,
    slot: Mapping[str, Any],
    clip_share: float,
    command: str | None,
) -> dict[str, Any]:
    fingerprints = fingerprint_all(tower)
    earlier = read_record(source)
    history = earlier.pop("history", [])
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": SWAPPED,
        "adapter": MODEL_TYPE,
        "base": {"reference": str(source), "path": str(source.resolve())},
        "tower": {
            "source": f"the weight files of {source}",
            "fingerprint": fingerprints["float32"],
            "fingerprints": fingerprints,
            "manifest": (earlier.get("tower") or {}).get("manifest"),
        },
        "expert": {
            "source": second.source,
            "model_type": second.model_type,
            "fingerprint": second.weights_fingerprint,
            "clip_share": clip_share,
        },
        "slot": dict(slot),
        "base_card": earlier.get("base_card") or base_card_metadata(source),
        "command": command,
        "versions": library_versions(),
        "created": utc_now(),
        "history": [*history, earlier] if earlier else [],
    }


def _read_back(written: Path) -> None:
    """Make sure that the result is what a swap or an evaluation will take it for."""
    from kuea_mllm.adapters.llava_mof.adapter import LlavaMofAdapter

    adapter = LlavaMofAdapter()
    adapter.check_base(written)
    adapter.tower_slot(written)
