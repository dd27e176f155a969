"""Released OpenFlamingo files to a Hugging Face directory and back, one tensor at a time.

Strict both ways: every tensor of checkpoint, language model and tower is accounted for or refused
by name; values and dtypes are kept bit for bit. Of the language model only the token embedding is
left out, because the checkpoint brings a trained one; the two are compared, since they tell whether
checkpoint and language model belong together.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.import_card import render_import_card
from kuea_mllm.adapters.openflamingo import keys, release_checks, released
from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig
from kuea_mllm.adapters.openflamingo.released_files import (
    Renamed,
    open_checkpoint,
    open_language_model,
)
from kuea_mllm.adapters.records import RECORD_FILE, SWAPPED, describe_slot
from kuea_mllm.errors import UserError
from kuea_mllm.io import atomic_directory, require_free_output, write_json, write_text
from kuea_mllm.manifest import SCHEMA_VERSION, library_versions, utc_now
from kuea_mllm.model_card import CARD_FILE, base_card_metadata
from kuea_mllm.model_files import INDEX_FILE, SINGLE_FILE, tensor_entries
from kuea_mllm.towers.files.shards import PlannedTensor, as_planned, open_shard, write_safetensors
from kuea_mllm.towers.formats import keys as tower_keys
from kuea_mllm.towers.model.fingerprint import fingerprint_all
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower

LOGGER = logging.getLogger("kuea_mllm")

# The tower that every released OpenFlamingo was trained with.
RELEASED_TOWER = "openai/clip-vit-large-patch14"
_SHARD_BYTES = 4 << 30
_CARD = {
    "loader": "OpenFlamingoForConditionalGeneration",
    "loader_module": "kuea_mllm.adapters.openflamingo.modeling",
    "processor": "OpenFlamingoProcessor",
    "processor_module": "kuea_mllm.adapters.openflamingo.processing",
    "changes": "All weights keep their values and dtype.",
    # Without a Hub id its path would only say checkpoint.pt.
    "fallback_name": "OpenFlamingo",
}


def import_released(
    checkpoint: Path,
    language_model: Path,
    destination: Path,
    *,
    tower: str | Path = RELEASED_TOWER,
    tokenizer: Path | None = None,
    activation: str | None = None,
    heads: int | None = None,
    accept: Collection[str] = (),
    shard_bytes: int = _SHARD_BYTES,
    command: str | None = None,
) -> None:
    """Write the Hugging Face form of a released OpenFlamingo.

    Args:
        checkpoint: The trained part, `checkpoint.pt`.
        language_model: Directory of the language model that belongs to it.
        destination: Directory to create.
        tower: The CLIP tower, anything that `load_tower` takes.
        tokenizer: Directory of the tokenizer, by default the language model's.
        activation: The tower's, where its files do not state it.
        heads: Likewise.
        accept: What may differ from the release: "embedding" (the language model's from the
            checkpoint's, beyond the rows that training changes), "tower" (image size, patches,
            depth, heads, activation).
        shard_bytes: Begin another weight file beyond this size.
        command: Command line to record.

    Raises:
        UserError: If a part is incomplete, damaged, of another kind, or does not fit the others.
        EnvironmentFailure: If the disk is full.
    """
    release_checks.check_accepted(accept)
    require_free_output(destination)
    trained = open_checkpoint(checkpoint)
    lm_config, lm = open_language_model(language_model)
    loaded = load_tower(tower, activation=activation, heads=heads, dtype=None)
    if loaded.spec.family != "clip":
        raise UserError(f"tower {tower} is not CLIP; OpenFlamingo reads a CLIP tower.")
    processor = _processor(tokenizer or language_model, loaded)
    config = released.model_config(
        {name: tuple(trained[name].shape) for name in trained},
        lm_config,
        _vision_config(loaded),
        image_token_id=processor.image_token_id,
        endofchunk_token_id=processor.endofchunk_token_id,
        where=str(checkpoint),
    )
    if release_checks.TOWER not in accept:
        release_checks.check_tower(loaded.spec, width=loaded.spec.width, source=tower)
    text: Any = config.text_config
    if len(processor.tokenizer) != text.vocab_size:
        raise UserError(
            f"the tokenizer of {tokenizer or language_model} has {len(processor.tokenizer)} tokens "
            f"with those of OpenFlamingo, the checkpoint {text.vocab_size}.",
            "Give the tokenizer of the release (GPT-NeoX-20B).",
        )
    lm_without_embedding = _without_embedding(lm, text, language_model)
    if release_checks.EMBEDDING not in accept:
        release_checks.check_embedding(
            trained[keys.RELEASED_EMBEDDING],
            lm[keys.LANGUAGE_MODEL_EMBEDDING],
            rows=min(processor.endofchunk_token_id, processor.image_token_id),
            language_model=language_model,
            name=keys.LANGUAGE_MODEL_EMBEDDING,
        )
    config.pad_token_id = processor.tokenizer.pad_token_id
    config.dtype = trained[keys.RELEASED_EMBEDDING].dtype
    parts = [
        _renamed(_checkpoint_names(config), trained, str(checkpoint)),
        _renamed(_language_model_names(config), lm_without_embedding, str(language_model)),
        {
            keys.TOWER_PREFIX + name: as_planned(tensor)
            for name, tensor in loaded.canonical_state().items()
            if name != tower_keys.PROJECTION
        },
    ]
    _check_shapes(config, parts)
    with atomic_directory(destination) as partial:
        config.architectures = ["OpenFlamingoForConditionalGeneration"]
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_json(partial / "generation_config.json", _generation_config(config))
        size = _write_weights(parts, partial, shard_bytes)
        record = {
            **_record(checkpoint, language_model, str(tower), loaded, size, accept),
            **_read_back(partial),
            "command": command,
        }
        write_json(partial / RECORD_FILE, record)
        write_text(partial / CARD_FILE, render_import_card(record, **_CARD))


def export_checkpoint(model_dir: Path, destination: Path) -> None:
    """Write the trained part of a model directory in the released layout.

    Args:
        model_dir: Directory in Hugging Face form.
        destination: File to create: `.pt` as released, or `.safetensors`.

    Raises:
        UserError: If a tensor is missing, or `destination` exists or ends otherwise.
        EnvironmentFailure: If the disk is full.
    """
    config = OpenFlamingoConfig.from_pretrained(model_dir)
    _export(model_dir, _checkpoint_names(config), destination)


def export_language_model(model_dir: Path, destination: Path) -> None:
    """Write the language model in its released layout, with the trained embedding as its own.

    Raises:
        UserError: As for `export_checkpoint`.
        EnvironmentFailure: Likewise.
    """
    config = OpenFlamingoConfig.from_pretrained(model_dir)
    names = _language_model_names(config) | {keys.LANGUAGE_MODEL_EMBEDDING: keys.EMBEDDING}
    _export(model_dir, names, destination)


def _export(model_dir: Path, names: Mapping[str, str], destination: Path) -> None:
    if destination.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{destination} ends neither in .pt nor in .safetensors.")
    require_free_output(destination)
    entries = tensor_entries(model_dir)
    shards = {file: open_shard(model_dir / file) for file in {e.file for e in entries.values()}}
    if missing := [new for new in names.values() if new not in entries]:
        raise UserError(
            f"{model_dir} lacks {len(missing)} tensors of an OpenFlamingo, first {missing[0]}.",
            "Restore the directory from its source.",
        )
    # A directory of its own, so that the file appears only once it is complete.
    partial = destination.with_name(f".{destination.name}.d")
    with atomic_directory(partial) as inside:
        if destination.suffix == ".safetensors":
            planned = {
                old: as_planned(shards[entries[new].file][new]) for old, new in names.items()
            }
            write_safetensors(inside / destination.name, planned)
        else:
            # torch.save needs all tensors; they are mapped from the files and not copied.
            state = {old: shards[entries[new].file][new] for old, new in names.items()}
            torch.save(state, inside / destination.name)
    (partial / destination.name).rename(destination)
    partial.rmdir()


def _checkpoint_names(config: OpenFlamingoConfig) -> dict[str, str]:
    return keys.checkpoint_names(
        perceiver_depth=config.perceiver_depth, gated_layers=released.gated_layers(config)
    )


def _language_model_names(config: OpenFlamingoConfig) -> dict[str, str]:
    text: Any = config.text_config
    return keys.language_model_names(layers=text.num_hidden_layers, qk_norm=text.qk_norm)


def _renamed(
    names: Mapping[str, str], content: Mapping[str, Tensor], where: str
) -> dict[str, PlannedTensor]:
    keys.check_names(content, names, where)
    planned = {}
    for old, new in names.items():
        tensor = content[old]
        # Read again when it is written, so that no more than one is held.
        read = functools.partial(_read, content, old)
        planned[new] = PlannedTensor(tensor.dtype, tuple(tensor.shape), read)
    return planned


def _read(content: Mapping[str, Tensor], name: str) -> Tensor:
    return content[name].detach().cpu()


def _without_embedding(lm: Mapping[str, Tensor], text: Any, where: Path) -> Mapping[str, Tensor]:
    """Leave out the embedding; it has to be there and to fit, and the checkpoint replaces it."""
    name = keys.LANGUAGE_MODEL_EMBEDDING
    if name not in lm:
        raise UserError(f"{where} lacks {name}: it is not the language model of an OpenFlamingo.")
    if lm[name].shape[-1] != text.hidden_size:
        raise UserError(
            f"{where}: {name} is {lm[name].shape[-1]} wide, config.json says {text.hidden_size}."
        )
    return Renamed({other: (lm, other) for other in lm if other != name})


def _check_shapes(config: OpenFlamingoConfig, parts: list[dict[str, PlannedTensor]]) -> None:
    """Make sure that the parts are exactly the tensors that the configuration builds."""
    from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration

    with torch.device("meta"):
        model = OpenFlamingoForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = {name: planned.shape for part in parts for name, planned in part.items()}
    keys.check_names(found, expected, "the model that these parts make")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{name} has shape {found[name]}; with the other parts it should be {shape}.",
                "Check that checkpoint, language model and tower belong to the same release.",
            )


def _processor(tokenizer: Path, tower: Tower) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging as library_logging

    from kuea_mllm.adapters.openflamingo.processing import (
        OpenFlamingoImageProcessor,
        OpenFlamingoProcessor,
    )

    loader: Any = AutoTokenizer
    messages: Any = library_logging
    level = messages.get_verbosity()
    # It warns that it does not know the language model beside the tokenizer, which it need not.
    messages.set_verbosity_error()
    try:
        loaded = loader.from_pretrained(
            tokenizer, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    # transformers and tokenizers raise anything here, bare `Exception` included.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{tokenizer} holds no tokenizer that can be read ({lines[0]}).",
            "Give the directory of GPT-NeoX-20B's tokenizer with --tokenizer.",
        ) from error
    finally:
        messages.set_verbosity(level)
    spec = tower.spec
    images = OpenFlamingoImageProcessor(spec.image_size, spec.mean, spec.std)
    return OpenFlamingoProcessor(images, loaded)


def _vision_config(tower: Tower) -> dict[str, Any]:
    config: dict[str, Any] = tower.model.config.to_dict()
    # Of the class that is saved, not of the one that was loaded.
    for key in ("architectures", "dtype", "transformers_version", "_name_or_path"):
        config.pop(key, None)
    return config


def _generation_config(config: OpenFlamingoConfig) -> dict[str, Any]:
    end = config.endofchunk_token_id
    return {"eos_token_id": end, "pad_token_id": config.pad_token_id, "use_cache": True}


def _write_weights(parts: list[dict[str, PlannedTensor]], out: Path, shard_bytes: int) -> int:
    """Write the parts, the tower last and alone, so that a swap rewrites that file only."""
    shards: list[dict[str, PlannedTensor]] = []
    for part in parts:
        size = shard_bytes + 1
        for name, planned in part.items():
            if size + planned.size > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = planned
            size += planned.size
    total = sum(planned.size for shard in shards for planned in shard.values())
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = SINGLE_FILE if len(shards) == 1 else name
        write_safetensors(out / name, shard)
        LOGGER.info("Wrote %s (%d tensors).", name, len(shard))
        places |= dict.fromkeys(shard, name)
    write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})
    return total


def _read_back(written: Path) -> dict[str, Any]:
    """Make sure that the result is what a swap or an evaluation will take it for."""
    from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter

    adapter = OpenFlamingoAdapter()
    adapter.check_base(written)
    return {"adapter": adapter.name, "slot": describe_slot(adapter.tower_slot(written))}


def _record(
    checkpoint: Path,
    language_model: Path,
    tower: str,
    loaded: Tower,
    size: int,
    accept: Collection[str],
) -> dict[str, Any]:
    state = {n: t for n, t in loaded.canonical_state().items() if n != tower_keys.PROJECTION}
    fingerprints = fingerprint_all(state)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": SWAPPED,
        "base": {"reference": str(checkpoint), "path": str(checkpoint.resolve())},
        "tower": {
            "source": tower,
            "fingerprint": fingerprints["float32"],
            "fingerprints": fingerprints,
            "manifest": loaded.manifest,
        },
        "imported": {
            "layout": "openflamingo_released",
            "checkpoint": str(checkpoint.resolve()),
            "language_model": str(language_model.resolve()),
            "accepted_differences": sorted(accept),
            "bytes": size,
        },
        "base_card": base_card_metadata(checkpoint.parent),
        "versions": library_versions(),
        "created": utc_now(),
        "history": [],
    }
