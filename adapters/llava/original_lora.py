"""LoRA weights of LLaVA in its authors' layout, and back: tensors keep every bit.

The original code saves what PEFT saves, under the names of its own model, and beside it
`non_lora_trainables.bin` with whatever else was trained: the projector, or nothing where it was
frozen, as in the runs of the code released with the paper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kuea_mllm.adapters.llava.original import TOWER_KEY, original_config
from kuea_mllm.adapters.llava.original_weights import new_name
from kuea_mllm.adapters.lora_directory import (
    LORA,
    PICKLED_WEIGHTS_FILE,
    PREFIX,
    WEIGHTS_FILE,
    LoraDirectory,
    describe_tensors,
    open_lora_directory,
    read_lora_directory,
    write_lora_directory,
)
from kuea_mllm.adapters.named_tower import local_directory
from kuea_mllm.adapters.records import PEFT_CONFIG, read_record
from kuea_mllm.errors import OutputError, UserError
from kuea_mllm.io import atomic_directory, follow_umask, read_json, require_free_output, write_json
from kuea_mllm.manifest import SCHEMA_VERSION, library_versions, utc_now
from kuea_mllm.towers.files.checkpoints import read_checkpoint_file

# See `lora_directory.find_lora_directory`, which tells the layout by it.
OTHERS_FILE = "non_lora_trainables.bin"
LAYOUT = "llava_original_lora"

_PROJECTOR = "multi_modal_projector"
# Name in the original model -> name in ours.
_OTHERS = {
    name: f"model.{new_name(name)}"
    for name in (f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))
}
_LAYER = re.compile(r"model\.(layers\.\d+\..+)")
_OUR_LAYER = re.compile(r"model\.language_model\.(layers\.\d+\..+)")
# What the PEFT of the original (0.4.0) knows.
_CONFIG_KEYS = (
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "r"),
    *("revision", "target_modules", "task_type"),
)
# How the original writes the settings of LLaVA-1.5 that Hugging Face's form has no key for.
_LLAVA_15 = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    "image_aspect_ratio": "pad",
    "torch_dtype": "bfloat16",
}
_TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("initializer_range", "attention_bias", "bos_token_id", "eos_token_id"),
)


def import_lora(source: Path, destination: Path, *, command: str | None = None) -> None:
    """Write LoRA weights in the authors' layout as a PEFT directory for the Hugging Face form.

    Args:
        source: Directory with `adapter_config.json`, `adapter_model.bin` or `.safetensors`,
            `non_lora_trainables.bin` and `config.json`.
        destination: Directory to create.
        command: Command line to record.

    Raises:
        UserError: If a file is missing or damaged, a tensor is none of LLaVA-1.5's language model
            or projector, or `destination` exists.
    """
    source, destination = Path(source), Path(destination)
    _require_place(source, destination)
    config = original_config(source)
    lora = open_lora_directory(source)
    tensors = {
        PREFIX + _renamed_layer(name, source): lora.tensors[name].clone() for name in lora.tensors
    }
    others = _read_others(source)
    tensors |= {PREFIX + name: tensor.clone() for name, tensor in others.items()}
    reference = lora.config.get("base_model_name_or_path") or config.get("_name_or_path")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": LORA,
        "adapter": "llava",
        # The release does not say what its base is recognised by.
        "base": {"reference": reference},
        "lora": {
            "rank": lora.config["r"],
            "alpha": lora.config["lora_alpha"],
            "dropout": lora.config.get("lora_dropout"),
            "projector": "train" if others else "freeze",
        },
        "tensors": describe_tensors(tensors),
        "imported": {
            "layout": LAYOUT,
            "config": dict(config),
            "adapter_config": dict(lora.config),
            "weights_file": _weights_file(source),
        },
        "versions": library_versions(),
        "created": utc_now(),
        "command": command,
    }
    with atomic_directory(destination) as partial:
        write_lora_directory(partial, _our_config(lora, bool(others)), tensors, manifest)
        open_lora_directory(partial)


def export_lora(source: Path, destination: Path, *, tower: str | None = None) -> None:
    """Write LoRA weights as the authors' code saves and loads them.

    Args:
        source: Directory of LoRA weights for LLaVA-1.5 in Hugging Face form.
        destination: Directory to create.
        tower: What `mm_vision_tower` of its config.json shall name, for weights whose base was not
            converted from the authors' layout.

    Raises:
        UserError: If something was tuned that the layout has no place for, the original
            configuration cannot be told, or `destination` exists.
    """
    source, destination = Path(source), Path(destination)
    _require_place(source, destination)
    lora = read_lora_directory(source)
    imported = lora.record.get("imported")
    imported = imported if isinstance(imported, Mapping) else {}
    matrices: dict[str, Tensor] = {}
    for layer, pair in lora.pairs.items():
        found = _OUR_LAYER.fullmatch(layer)
        if found is None:
            raise UserError(
                f"{source}: {layer} has LoRA, for which the authors' layout has no place.",
                "Only layers of the language model can be exported.",
            )
        for name, kind in ((pair.a, "A"), (pair.b, "B")):
            matrices[f"{PREFIX}model.{found[1]}.lora_{kind}.weight"] = lora.tensors[name]
    names = {ours: original for original, ours in _OTHERS.items()}
    others: dict[str, Tensor] = {}
    for ours, name in lora.whole.items():
        if ours not in names:
            raise UserError(
                f"{source}: {ours} was trained as a whole, for which the authors' layout has no "
                "place.",
                "Only the projector can be exported beside LoRA; merge the weights instead.",
            )
        others[PREFIX + names[ours]] = lora.tensors[name]
    config = dict(imported.get("config") or _config_of_base(lora, tower))
    with atomic_directory(destination) as partial:
        if imported.get("weights_file") == WEIGHTS_FILE:
            save_file(
                {n: t.contiguous() for n, t in matrices.items()},
                partial / WEIGHTS_FILE,
                metadata={"format": "pt"},
            )
            follow_umask(partial / WEIGHTS_FILE)
        else:
            torch.save({n: t.clone() for n, t in matrices.items()}, partial / PICKLED_WEIGHTS_FILE)
        torch.save({n: t.clone() for n, t in others.items()}, partial / OTHERS_FILE)
        write_json(partial / "config.json", config)
        write_json(
            partial / PEFT_CONFIG, imported.get("adapter_config") or _original_peft_config(lora)
        )


def _require_place(source: Path, destination: Path) -> None:
    require_free_output(destination)
    if destination.resolve().is_relative_to(source.resolve()):
        raise OutputError(
            f"output {destination} lies inside of the source {source}.", "Choose another place."
        )


def _weights_file(source: Path) -> str:
    return WEIGHTS_FILE if (source / WEIGHTS_FILE).is_file() else PICKLED_WEIGHTS_FILE


def _renamed_layer(name: str, where: Path) -> str:
    found = _LAYER.fullmatch(name.removeprefix(PREFIX))
    if found is None:
        raise UserError(
            f"{where}: tensor {name} is no LoRA matrix of a layer of LLaVA's language model.",
            "LoRA on the vision tower or the projector cannot be converted."
            if "vision_tower" in name or "mm_projector" in name
            else "Give the directory as the authors' train script wrote it.",
        )
    return f"model.language_model.{found[1]}"


def _read_others(source: Path) -> dict[str, Tensor]:
    """Return what was trained beside LoRA, by its name in our model."""
    path = source / OTHERS_FILE
    if not path.is_file():
        raise UserError(
            f"{source} has no {OTHERS_FILE}, in which the authors' code saves the projector.",
            "The directory is incomplete. Where the projector was not trained, the file is there "
            "and holds nothing.",
        )
    found: dict[str, Tensor] = {}
    for name, value in read_checkpoint_file(path).items():
        # As the original loader does it.
        short = name.removeprefix("base_model.")
        short = short.removeprefix("model.") if short.startswith("model.model.") else short
        if short not in _OTHERS or not isinstance(value, Tensor):
            raise UserError(
                f"file {path}: {name} is no tensor of LLaVA-1.5's projector (mlp2x_gelu).",
                "Other parts that were trained as a whole cannot be converted.",
            )
        found[_OTHERS[short]] = value
    if found and found.keys() != set(_OTHERS.values()):
        missing = min(set(_OTHERS.values()) - found.keys())
        raise UserError(
            f"file {path} holds a part of the projector only: {missing} is missing.",
            "Restore the directory from its source.",
        )
    return found


def _our_config(lora: LoraDirectory, has_projector: bool) -> dict[str, Any]:
    if lora.config.get("rank_pattern") or lora.config.get("alpha_pattern"):
        raise UserError(
            f"{lora.path / PEFT_CONFIG} has patterns of rank or alpha, which the authors' code "
            "does not make.",
            "Give the directory as their train script wrote it.",
        )
    targets = sorted(_renamed_layer(f"{PREFIX}{layer}", lora.path) for layer in lora.pairs)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        "base_model_name_or_path": lora.config.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": lora.config["r"],
        "lora_alpha": lora.config["lora_alpha"],
        "lora_dropout": lora.config.get("lora_dropout", 0.0),
        "use_rslora": bool(lora.config.get("use_rslora")),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": targets,
        "modules_to_save": [f"model.{_PROJECTOR}"] if has_projector else None,
    }


def _original_peft_config(lora: LoraDirectory) -> dict[str, Any]:
    if lora.config.get("rank_pattern") or lora.config.get("alpha_pattern"):
        raise UserError(
            f"{lora.path / PEFT_CONFIG} has patterns of rank or alpha, which the PEFT of the "
            "authors' code does not know.",
            "Merge the weights instead.",
        )
    if lora.config.get("use_rslora"):
        raise UserError(
            f"{lora.path / PEFT_CONFIG} sets use_rslora, which the PEFT of the authors' code does "
            "not know: it would scale the weights otherwise.",
            "Merge the weights instead.",
        )
    content = {key: lora.config.get(key) for key in _CONFIG_KEYS}
    return content | {
        "task_type": "CAUSAL_LM",
        "modules_to_save": None,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in lora.pairs}),
    }


def _config_of_base(lora: LoraDirectory, tower: str | None) -> dict[str, Any]:
    """Return the configuration that the authors' code would have written for the base."""
    stated = lora.record.get("base")
    stated = stated if isinstance(stated, Mapping) else {}
    named = [stated.get("path"), stated.get("reference"), lora.config["base_model_name_or_path"]]
    found = (local_directory(name) for name in named if isinstance(name, str) and name)
    base = next((directory for directory in found if directory is not None), None)
    if base is None:
        raise UserError(
            f"the base of {lora.path} ({named[-1]}) is not on this machine: nothing says what "
            "config.json of the authors' layout should hold.",
            "Bring the base back to where it was.",
        )
    record = read_record(base)
    for entry in (record, *reversed(record.get("history") or [])):
        imported = entry.get("imported") if isinstance(entry, Mapping) else None
        config = imported.get("config") if isinstance(imported, Mapping) else None
        if isinstance(config, Mapping) and TOWER_KEY in config:
            return {**config} | ({TOWER_KEY: tower} if tower else {})
    if tower is None:
        raise UserError(
            f"{base}, the base of {lora.path}, was not converted from the authors' layout, so that "
            "nothing says which tower their loader shall take.",
            "Name it with --tower, for LLaVA-1.5 openai/clip-vit-large-patch14-336.",
        )
    return _made_config(base, tower)


def _made_config(base: Path, tower: str) -> dict[str, Any]:
    from kuea_mllm.adapters.llava.adapter import resolve_config
    from kuea_mllm.adapters.llava.tuner import tuning_parts

    config = resolve_config(base)
    text = config.text_config
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise UserError(
            f"{base / 'config.json'} reads several layers of its tower, which the authors' code "
            "cannot do."
        )
    rope: Mapping[str, Any] = text.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{base / 'config.json'} scales its rotary positions; LLaVA-1.5 does not.")
    raw = read_json(base / "config.json").get("text_config") or {}
    drops_cls = config.vision_feature_select_strategy == "default"
    return {
        **_LLAVA_15,
        **{key: getattr(text, key) for key in _TEXT_KEYS},
        "vocab_size": tuning_parts(base).vocabulary_size,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "pad_token_id": 0,
        TOWER_KEY: tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "patch" if drops_cls else "cls_patch",
    }
