"""Take the wrapping off a checkpoint, and name what is no CLIP or SigLIP tower at all.

Wrapping is what training tools put around a state dict: a dictionary one level up, a prefix before
every key. It is taken off only where that is unambiguous, and said in the log.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.errors import TowerError
from kuea_mllm.io import read_json
from kuea_mllm.towers.formats import keys

_ADAPTER_CONFIG = "adapter_config.json"
# Written by DataParallel ("module"), torch.compile ("_orig_mod") and modules that hold the tower.
PREFIXES = ("module.", "_orig_mod.", "model.", "vision_tower.")
# Where open_clip's training, Lightning and others keep the weights beside their optimiser.
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")

# What follows the last dot of a module's path in peft's names: lora_A.weight, lora_A.default.weight
# (https://huggingface.co/docs/peft, "LoRA"); "base_layer" holds the weights it was added to.
_LORA = re.compile(r"(^|\.)(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)(\.|$)")


def unwrap(
    content: Mapping[str, Any], is_known: Callable[[Collection[str]], bool]
) -> tuple[Mapping[str, Any], list[str]]:
    """Take off a container and a prefix that all keys share, if what is left is a known layout.

    Args:
        content: What a checkpoint file holds.
        is_known: Says by its top-level names whether a dictionary is of a known layout.

    Returns:
        The unwrapped content and what was taken off, outermost first; `content` itself and nothing
        if it is of a known layout as it is, or if nothing helps.
    """
    if is_known(content):
        return content, []
    inner = [(f"the entry {name!r}", content[name]) for name in CONTAINERS if _holds(content, name)]
    # Two candidates, such as a model and its average, are for the user to choose from.
    candidates = [("", content), *(inner if len(inner) == 1 else [])]
    for container, state in candidates:
        prefix = shared_prefix(state)
        for taken in ("", prefix):
            bare = {str(name).removeprefix(taken): value for name, value in state.items()}
            if (taken or container) and is_known(bare):
                off = [container] if container else []
                return bare, off + ([f"the prefix {taken!r} of every key"] if taken else [])
    return content, []


def shared_prefix(names: Iterable[str]) -> str:
    """Return the longest run of `PREFIXES` that every name begins with; "" if there is none."""
    left = [str(name) for name in names]
    found = ""
    while left:
        shared = next((p for p in PREFIXES if all(n.startswith(p) for n in left)), "")
        if not shared:
            break
        found += shared
        left = [name.removeprefix(shared) for name in left]
    return found


def unmerged_lora_keys(names: Iterable[str]) -> list[str]:
    """Return the names that belong to LoRA weights which were not merged into the tower."""
    return [str(name) for name in names if _LORA.search(str(name))]


def refuse_lora(names: Iterable[str], where: str) -> None:
    """Refuse weights with LoRA parts.

    Raises:
        TowerError: Naming the first part.
    """
    found = unmerged_lora_keys(names)
    if found:
        raise TowerError(
            f"{where} holds LoRA weights that were not merged ({found[0]} and {len(found) - 1} "
            "more): without them it would be the tower from before the tuning.",
            "Merge first: load it with peft, call merge_and_unload(), save the result.",
        )


def refuse_adapter_directory(path: Path) -> None:
    """Refuse a directory that holds an adapter of peft and no model.

    Raises:
        TowerError: Naming the base that the adapter is for.
    """
    has_weights = any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    if not (path / _ADAPTER_CONFIG).is_file() or has_weights:
        return
    content = read_json(path / _ADAPTER_CONFIG)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    raise TowerError(
        f"{path} is a PEFT adapter (LoRA weights) for {base or 'a base it does not name'}, not a "
        "model: it holds differences only.",
        "Merge first: `kuea-mllm merge DIR NEW` for that of a multimodal model; for that of a "
        "tower load base and adapter with peft, call merge_and_unload(), save the result.",
    )


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """Refuse the weights of vision models that are neither CLIP's nor SigLIP's ViT, by their name.

    Raises:
        TowerError: If the names are those of such a model.
    """
    inner = {
        str(name).removeprefix(keys.VISUAL_PREFIX).removeprefix(keys.TRUNK_PREFIX) for name in names
    }
    for kind, is_it in _FOREIGN.items():
        if is_it(inner):
            raise TowerError(
                f"{where} looks like {kind}, whose vision model has parts that neither CLIP's nor "
                "SigLIP's has.",
                "It cannot take the place of such a tower; give a CLIP or SigLIP ViT.",
            )


def _holds(content: Mapping[str, Any], name: str) -> bool:
    return isinstance(content.get(name), Mapping) and bool(content[name])


def _ends(names: set[str], *endings: str) -> bool:
    return any(name.endswith(endings) for name in names)


# Names as in timm's registry and in open_clip, read off models built without weights (timm 1.0,
# open_clip 3.3); EVA-CLIP's own files have EVA02's names below "visual.".
_FOREIGN: dict[str, Callable[[set[str]], bool]] = {
    "EVA-CLIP (EVA-01 or EVA-02)": lambda names: (
        "cls_token" in names and _ends(names, ".attn.q_bias", ".attn.q_proj.weight")
    ),
    "a Perception Encoder (PE-Core)": lambda names: (
        {"norm_pre.weight", "attn_pool.latent"} <= names
    ),
    "ViTamin": lambda names: any(n.startswith("patch_embed.backbone.stem.") for n in names),
    "a ConvNeXt CLIP": lambda names: "stages.0.blocks.0.conv_dw.weight" in names,
    "MobileCLIP (FastViT)": lambda names: any(".token_mixer." in name for name in names),
    "a ResNet CLIP": lambda names: {"attnpool.c_proj.weight", "layer1.0.conv1.weight"} <= names,
    "a plain ViT such as DINOv2": lambda names: {"cls_token", "blocks.0.attn.qkv.weight"} <= names,
}
