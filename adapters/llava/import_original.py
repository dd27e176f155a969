"""Turns LLaVA-1.5 in its authors' layout into the Hugging Face form, a tensor at a time.

Every tensor and every setting is accounted for or refused; dtypes are kept. The vocabulary is
padded to a multiple of 64, as in the published conversions, since `<image>` and `<pad>` need rows.
Rows that no text uses are filled so that they are never generated: a zero embedding, the mean row
in the output layer, and `suppress_tokens` in generation_config.json. They still take part in the
softmax of a loss, so training code has to cut logits to the original vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.import_card import render_import_card
from kuea_mllm.adapters.llava import original_files as files
from kuea_mllm.adapters.llava.original import (
    TOWER_KEY,
    TOWER_MODULE,
    UNFREEZE_KEY,
    check_original,
    describe_tower,
    original_config,
)
from kuea_mllm.adapters.llava.original_tokenizer import TokenIds, write_tokenizer
from kuea_mllm.adapters.llava.original_weights import (
    TOWER_PREFIX,
    OriginalWeights,
    plan_file,
    sort_weights,
)
from kuea_mllm.adapters.named_tower import local_directory
from kuea_mllm.adapters.records import RECORD_FILE, SWAPPED, describe_slot, read_record
from kuea_mllm.errors import OutputError, TowerMismatch, UserError
from kuea_mllm.io import atomic_directory, require_free_output, write_json, write_text
from kuea_mllm.manifest import SCHEMA_VERSION, library_versions, utc_now
from kuea_mllm.model_card import CARD_FILE, base_card_metadata
from kuea_mllm.model_files import INDEX_FILE
from kuea_mllm.towers.files.shards import as_planned, loaded_shards, open_shard, write_safetensors
from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.formats.locate import expected_shapes, locate_tensors
from kuea_mllm.towers.model.fingerprint import ROUNDINGS, fingerprint_all, fingerprint_state
from kuea_mllm.towers.reading.load import load_tower

LOGGER = logging.getLogger("kuea_mllm")

_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class ChosenTower:
    """The tower that goes into the Hugging Face form.

    Attributes:
        state: Weights of the body under canonical names, in the dtype to write.
        config: Keys as in `transformers.CLIPVisionConfig`.
        mean: Channel means.
        std: Channel deviations.
        source: Where it comes from, in words.
        manifest: Its own `kuea.json`, if it has one.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    manifest: Mapping[str, Any] | None = None


def import_original(
    source: Path,
    destination: Path,
    *,
    vision_tower: str | Path | None = None,
    command: str | None = None,
) -> None:
    """Write the Hugging Face form of an original LLaVA-1.5 directory.

    Args:
        source: Directory in the original layout, safetensors or `.bin`, whole or in shards.
        destination: Directory to create.
        vision_tower: The tower to take; None takes the one inside of the weight files, else the one
            that the configuration names, which may be fetched.
        command: Command line to record.

    Raises:
        UserError: If the source is incomplete, damaged, or anything but LLaVA-1.5.
        EnvironmentFailure: If the disk is full.
    """
    source, destination = Path(source), Path(destination)
    require_free_output(destination)
    if destination.resolve().is_relative_to(source.resolve()):
        raise OutputError(
            f"output {destination} lies inside of the source {source}.", "Choose another place."
        )
    check_original(source)
    config, where = original_config(source), source / "config.json"
    text = files.text_settings(config, where)
    shards = {name: open_shard(source / name) for name in loaded_shards(source)}
    weights = sort_weights(shards, text, source)
    tower = _choose_tower(weights, config, source, vision_tower)
    _check_projector(weights, tower, where)
    with atomic_directory(destination) as partial:
        ids = write_tokenizer(source, partial)
        if ids.known > text["vocab_size"]:
            raise UserError(
                f"the tokenizer of {source} has {ids.known} tokens, config.json says vocab_size "
                f"{text['vocab_size']}.",
                "Restore the tokenizer and the configuration from the source of the model.",
            )
        vocabulary = _padded_vocabulary(text["vocab_size"], ids)
        size = _write_weights(weights, tower, vocabulary, partial)
        dtype = str(weights.dtype).removeprefix("torch.")
        model = files.model_config(
            config, text, tower.config, ids, vocabulary=vocabulary, dtype=dtype, where=where
        )
        write_json(partial / "config.json", model)
        images = files.image_processor(config, tower.config["image_size"], tower.mean, tower.std)
        files.write_processor(partial, images, model)
        files.write_generation_config(source, partial, ids, vocabulary)
        record = _record(source, config, weights, tower, vocabulary, size)
        slot = _read_back(partial, tower)
        record |= {"slot": slot, "command": command}
        write_json(partial / RECORD_FILE, record)
        card = render_import_card(record, loader="LlavaForConditionalGeneration")
        write_text(partial / CARD_FILE, card)
    if left_out := files.keys_left_out(config):
        LOGGER.warning(
            "%s: these keys have no counterpart and were left out: %s", where, ", ".join(left_out)
        )


def _choose_tower(
    weights: OriginalWeights,
    config: Mapping[str, Any],
    source: Path,
    wanted: str | Path | None,
) -> ChosenTower:
    name = str(config[TOWER_KEY])
    if wanted is not None or not weights.tower:
        if wanted is None:
            LOGGER.info("%s holds no vision tower; taking %s, which it names.", source, name)
        elif weights.tower:
            LOGGER.info("The tower inside of %s is left out; taking %s.", source, wanted)
        return _tower_from(wanted or name, weights.dtype)
    described = describe_tower(name, source / "config.json")
    _, entries = locate_tensors(
        weights.tower_entries(),
        expected_shapes("clip", described.config),
        module=TOWER_MODULE,
        where=str(source),
    )
    state = {key: weights.tensor(entry.name) for key, entry in entries.items()}
    if strange := weights.tower.keys() - {entry.name for entry in entries.values()}:
        raise UserError(
            f"{source} holds {len(strange)} tensors that its tower does not have, first "
            f"{min(strange)}.",
            "Restore the directory from its source.",
        )
    if not config.get(UNFREEZE_KEY):
        _compare_with_named(state, name, source)
    return ChosenTower(
        state, described.config, described.mean, described.std, f"the weight files of {source}"
    )


def _tower_from(wanted: str | Path, dtype: torch.dtype) -> ChosenTower:
    tower = load_tower(wanted)
    if tower.spec.family != "clip":
        raise TowerMismatch(
            f"tower {wanted} is of the {tower.spec.family} family; LLaVA-1.5 has a CLIP tower.",
            "Give the tower that the configuration names.",
        )
    state = {
        name: tensor.detach().to(dtype)
        for name, tensor in tower.canonical_state().items()
        if name != keys.PROJECTION
    }
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TowerMismatch(
                f"{name} of tower {wanted} has values that {dtype} of the model cannot hold.",
                "Check the tower; its training may have diverged.",
            )
    vision: dict[str, Any] = tower.model.config.to_dict()
    return ChosenTower(state, vision, tower.spec.mean, tower.spec.std, str(wanted), tower.manifest)


def _compare_with_named(state: Mapping[str, Tensor], name: str, source: Path) -> None:
    """Make sure that the tower in the files is the one that the original loader would take."""
    directory = local_directory(name, with_weights=True)
    if directory is None:
        LOGGER.warning(
            "The tower is taken from the weight files of %s. Its own loader would take %s instead, "
            "which is not on this machine, so that the two were not compared.",
            source,
            name,
        )
        return
    dtype = next(iter(state.values())).dtype
    rounding = dtype if dtype in ROUNDINGS.values() else torch.float32
    named = load_tower(directory).model.state_dict()
    if fingerprint_state(state) != fingerprint_state(named, rounded_to=rounding):
        raise UserError(
            f"{source} holds another vision tower than {name}, which config.json names and its own "
            f"loader takes ({UNFREEZE_KEY} is not set).",
            f"Pass --tower {name} to take what its loader takes; or set {UNFREEZE_KEY} to true in "
            "config.json if the tower in the files is the one it was trained with.",
        )


def _check_projector(weights: OriginalWeights, tower: ChosenTower, where: Path) -> None:
    expected = weights.tensor("model.mm_projector.0.weight").shape[-1]
    if tower.config["hidden_size"] != expected:
        raise TowerMismatch(
            f"the tower ({tower.source}) is {tower.config['hidden_size']} wide, the projector of "
            f"{where.parent} takes {expected}.",
            f"Give the tower that {TOWER_KEY} in config.json names.",
        )


def _padded_vocabulary(size: int, ids: TokenIds) -> int:
    needed = max(size, ids.image + 1, ids.pad + 1)
    return -(-needed // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def _write_weights(weights: OriginalWeights, tower: ChosenTower, vocabulary: int, out: Path) -> int:
    """Write one file for each original one, and one for the tower alone; return the bytes.

    A later swap then rewrites that last file and links the others.
    """
    planned = [plan_file(weights, file, vocabulary) for file in weights.shards]
    planned.append({TOWER_PREFIX + name: as_planned(t) for name, t in tower.state.items()})
    planned = [content for content in planned if content]
    places: dict[str, str] = {}
    for number, content in enumerate(planned, start=1):
        name = f"model-{number:05d}-of-{len(planned):05d}.safetensors"
        write_safetensors(out / name, content)
        LOGGER.info("Wrote %s (%d tensors).", name, len(content))
        places |= dict.fromkeys(content, name)
    size = sum(tensor.size for content in planned for tensor in content.values())
    write_json(out / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": places})
    return size


def _read_back(written: Path, tower: ChosenTower) -> dict[str, Any]:
    """Make sure that the result is what a swap or an evaluation will take it for."""
    from kuea_mllm.adapters.llava.adapter import LlavaAdapter

    adapter = LlavaAdapter()
    adapter.check_base(written)
    slot = adapter.tower_slot(written)
    shapes = expected_shapes(slot.family, slot.vision_config)
    if shapes != {name: tuple(tensor.shape) for name, tensor in tower.state.items()}:
        raise AssertionError("the configuration that was written describes another tower")
    return describe_slot(slot)


def _record(
    source: Path,
    config: Mapping[str, Any],
    weights: OriginalWeights,
    tower: ChosenTower,
    vocabulary: int,
    size: int,
) -> dict[str, Any]:
    fingerprints = fingerprint_all(tower.state)
    earlier = read_record(source)
    history = earlier.pop("history", [])
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": SWAPPED,
        "adapter": "llava",
        "base": {"reference": str(source), "path": str(source.resolve())},
        "tower": {
            "source": tower.source,
            "fingerprint": fingerprints["float32"],
            "fingerprints": fingerprints,
            "manifest": tower.manifest,
        },
        "imported": {
            "layout": "llava_original",
            "config": dict(config),
            "tower_was_inside": bool(weights.tower),
            "padded_vocabulary": vocabulary,
            "dropped_buffers": len(weights.dropped),
            "keys_left_out": files.keys_left_out(config),
            "bytes": size,
        },
        "base_card": earlier.get("base_card") or base_card_metadata(source),
        "versions": library_versions(),
        "created": utc_now(),
        "history": [*history, earlier] if earlier else [],
    }
