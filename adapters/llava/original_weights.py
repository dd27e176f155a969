"""Renames the tensors of an original LLaVA for transformers, every one accounted for."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.errors import UserError
from kuea_mllm.model_files import TensorEntry
from kuea_mllm.towers.files.shards import PlannedTensor, as_planned
from kuea_mllm.towers.formats import keys

# What the published models in Hugging Face form are written with; every transformers that knows
# LLaVA reads it, today's included.
TOWER_PREFIX = "vision_tower.vision_model."

_ORIGINAL_TOWER = "model.vision_tower."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PROJECTOR = {
    f"model.mm_projector.{index}.{kind}": f"multi_modal_projector.{layer}.{kind}"
    for index, layer in ((0, "linear_1"), (2, "linear_2"))
    for kind in ("weight", "bias")
}
# Stored by the transformers of 2023, computed from the configuration today.
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class OriginalWeights:
    """All tensors of an original LLaVA, sorted by what becomes of them.

    Attributes:
        shards: Content of each weight file by its name.
        language: Original name -> file, of language model and projector.
        tower: Likewise of the vision tower; empty if the files hold none.
        dropped: Names of buffers that transformers computes by itself.
    """

    shards: Mapping[str, Mapping[str, Tensor]]
    language: Mapping[str, str]
    tower: Mapping[str, str]
    dropped: tuple[str, ...]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the language model or the tower."""
        return self.shards[self.language.get(name) or self.tower[name]][name]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the projector, which a tower from elsewhere is cast to."""
        return self.tensor(next(iter(_PROJECTOR))).dtype

    def tower_entries(self) -> dict[str, TensorEntry]:
        """Return the tower's tensors as `towers.formats.locate` wants them, without places."""
        return {
            name: TensorEntry(name, file, "", tuple(self.shards[file][name].shape), 0, 0)
            for name, file in self.tower.items()
        }


def sort_weights(
    shards: Mapping[str, Mapping[str, Tensor]], text_config: Mapping[str, Any], where: Path
) -> OriginalWeights:
    """Tell the tensors of a model apart, and make sure that none is missing, unknown or misshapen.

    Args:
        shards: Content of each weight file by its name.
        text_config: Configuration of the language model, vocabulary as in the files.
        where: The model directory, for messages.

    Raises:
        UserError: Naming the first tensor that is not as it should be.
    """
    language: dict[str, str] = {}
    tower: dict[str, str] = {}
    dropped: list[str] = []
    expected = {**_language_shapes(text_config), **_projector_shapes(shards, text_config)}
    unknown: list[str] = []
    for file, content in shards.items():
        for name in content:
            if name in language or name in tower:
                raise UserError(
                    f"{where} holds {name} twice, the second time in {file}.",
                    "Restore the directory from its source.",
                )
            if name in expected:
                language[name] = file
            elif name.startswith(_ORIGINAL_TOWER) and name.endswith(keys.IGNORED_SUFFIX):
                dropped.append(name)
            elif name.startswith(_ORIGINAL_TOWER):
                tower[name] = file
            elif _ROTARY.fullmatch(name):
                _check_rotary(name, content[name], text_config, where)
                dropped.append(name)
            elif name == _HEAD and torch.equal(content[name], _find(shards, _EMBEDDING)):
                # Tied to the embedding, yet written: transformers ties them again.
                dropped.append(name)
            else:
                unknown.append(name)
    _refuse_names(expected.keys() - language.keys(), unknown, where)
    for name, file in language.items():
        shape = tuple(shards[file][name].shape)
        if shape != expected[name]:
            raise UserError(
                f"{where}: {name} has shape {shape}, config.json asks for {expected[name]}.",
                "Configuration and weights do not belong together; restore the directory.",
            )
    return OriginalWeights(shards, language, tower, tuple(dropped))


def plan_file(weights: OriginalWeights, file: str, vocabulary: int) -> dict[str, PlannedTensor]:
    """Return what becomes of one weight file, the tower left out.

    Args:
        weights: All tensors.
        file: Name of the weight file.
        vocabulary: Number of rows to pad embedding and output to.
    """
    planned: dict[str, PlannedTensor] = {}
    for name, place in weights.language.items():
        if place != file:
            continue
        tensor = weights.shards[file][name]
        target = new_name(name)
        if name in (_EMBEDDING, _HEAD):
            shape = (vocabulary, *tensor.shape[1:])
            read = functools.partial(_padded, tensor, name, vocabulary)
            planned[target] = PlannedTensor(tensor.dtype, shape, read)
        else:
            planned[target] = as_planned(tensor)
    return planned


def new_name(name: str) -> str:
    """Return the name on disk, in Hugging Face form, of a tensor of language model or projector."""
    return _PROJECTOR.get(name) or f"language_model.{name}"


def _padded(tensor: Tensor, name: str, rows: int) -> Tensor:
    """Add rows for ids that no text has.

    In the output layer they are the mean row: their logit is the mean of all logits, so that they
    never win an argmax, which a zero row would wherever all true logits are negative.
    """
    missing = rows - tensor.shape[0]
    filling = torch.zeros_like(tensor[:1])
    if name == _HEAD:
        filling = tensor.mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, filling.expand(missing, -1)])


def _language_shapes(text_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    make: Any = LlamaConfig
    with torch.device("meta"), no_init_weights():
        model = LlamaForCausalLM(
            make(**{k: v for k, v in text_config.items() if k != "model_type"})
        )
    names = model.state_dict()
    if text_config.get("tie_word_embeddings"):
        names.pop(_HEAD)
    return {name: tuple(tensor.shape) for name, tensor in names.items()}


def _projector_shapes(
    shards: Mapping[str, Mapping[str, Tensor]], text_config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    width = int(text_config["hidden_size"])
    first = next(iter(_PROJECTOR))
    # Its input width is the tower's, which is compared where the tower is chosen.
    inputs = [content[first].shape[-1] for content in shards.values() if first in content]
    shapes = [(width, inputs[0] if inputs else width), (width,), (width, width), (width,)]
    return dict(zip(_PROJECTOR, shapes, strict=True))


def _find(shards: Mapping[str, Mapping[str, Tensor]], name: str) -> Tensor:
    for content in shards.values():
        if name in content:
            return content[name]
    return torch.empty(0)


def _check_rotary(name: str, found: Tensor, text_config: Mapping[str, Any], where: Path) -> None:
    width = int(text_config["hidden_size"]) // int(text_config["num_attention_heads"])
    theta = float(text_config["rope_theta"])
    expected = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    # Stored in half precision where the model is.
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=1e-2):
        raise UserError(
            f"{where}: {name} is not what rope_theta {theta:g} of config.json gives.",
            "Configuration and weights do not belong together; restore the directory.",
        )


def _refuse_names(missing: Iterable[str], unknown: Iterable[str], where: Path) -> None:
    missing, unknown = sorted(missing), sorted(unknown)
    if any("lora_" in name or name.startswith("base_model.") for name in unknown):
        raise UserError(
            f"{where} holds unmerged LoRA weights, such as {unknown[0]}.",
            "Merge them into their base first.",
        )
    for names, problem in ((missing, "lacks"), (unknown, "holds")):
        if names:
            what = "of LLaVA-1.5" if problem == "lacks" else "that LLaVA-1.5 does not have"
            raise UserError(
                f"{where} {problem} {len(names)} tensors {what}, first {names[0]}.",
                "Give a complete LLaVA-1.5 (Llama, mlp2x_gelu) in its original layout.",
            )
