"""A model directory as the files of a release: checkpoint, language model and tower, apart."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.adapters.openflamingo import keys, released
from kuea_mllm.adapters.openflamingo.adapter import CHECKPOINTS, LANGUAGE_MODEL, TOWER
from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig
from kuea_mllm.adapters.openflamingo.convert import export_checkpoint, export_language_model
from kuea_mllm.adapters.openflamingo.processing import OpenFlamingoProcessor
from kuea_mllm.io import atomic_directory, write_json
from kuea_mllm.model_files import SINGLE_FILE, tensor_entries
from kuea_mllm.towers.files.shards import PlannedTensor, open_shard, write_safetensors
from kuea_mllm.towers.formats import keys as tower_keys
from kuea_mllm.towers.spec import TowerSpec
from kuea_mllm.towers.writing.save import image_processor_config


def export_released(model_dir: Path, destination: Path) -> None:
    """Write the parts of a release; `import_released` of them gives the same model bit for bit.

    The checkpoint and the names and values of the language model are the released ones. The
    language model carries the trained embedding, whose rows include OpenFlamingo's tokens, and its
    tokenizer has them too. The tower is a plain Hugging Face directory.

    Args:
        model_dir: Directory in Hugging Face form.
        destination: Directory to create.

    Raises:
        UserError: If a tensor is missing, or `destination` exists.
        EnvironmentFailure: If the disk is full.
    """
    config = OpenFlamingoConfig.from_pretrained(model_dir)
    processor: Any = OpenFlamingoProcessor.from_pretrained(
        model_dir, local_files_only=True, trust_remote_code=False
    )
    text: Any = config.text_config
    with atomic_directory(destination) as partial:
        export_checkpoint(model_dir, partial / CHECKPOINTS[0])
        language_model = partial / LANGUAGE_MODEL
        language_model.mkdir()
        write_json(language_model / "config.json", released.released_text_config(text))
        processor.tokenizer.save_pretrained(language_model)
        export_language_model(model_dir, language_model / SINGLE_FILE)
        _export_tower(model_dir, config, processor.image_processor, partial / TOWER)


def _export_tower(
    model_dir: Path, config: OpenFlamingoConfig, images: Any, destination: Path
) -> None:
    entries = tensor_entries(model_dir)
    names = [name for name in entries if name.startswith(keys.TOWER_PREFIX)]
    shards = {file: open_shard(model_dir / file) for file in {entries[n].file for n in names}}
    planned = {}
    for name in names:
        content = shards[entries[name].file]
        tensor = content[name]
        # Read again when it is written, so that no more than one is held.
        read = functools.partial(_read, content, name)
        short = tower_keys.HF_PREFIX + name.removeprefix(keys.TOWER_PREFIX)
        planned[short] = PlannedTensor(tensor.dtype, tuple(tensor.shape), read)
    destination.mkdir()
    write_safetensors(destination / SINGLE_FILE, planned)
    vision: Any = config.vision_config
    stored = vision.to_dict() | {"architectures": ["CLIPVisionModel"]}
    write_json(destination / "config.json", stored)
    write_json(
        destination / "preprocessor_config.json",
        image_processor_config(_spec(vision, images)),
    )


def _read(content: Mapping[str, Tensor], name: str) -> Tensor:
    return content[name]


def _spec(vision: Any, images: Any) -> TowerSpec:
    mean, std = tuple(images.image_mean), tuple(images.image_std)
    return TowerSpec(
        family="clip",
        image_size=images.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_width=vision.intermediate_size,
        embedding_width=vision.hidden_size,
        activation=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        mean=mean,
        std=std,
        resize="shortest_edge",
    )
