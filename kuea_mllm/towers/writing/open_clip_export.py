"""Write a tower as a full open_clip repository, with the text half of a given CLIP or SigLIP.

What `open_clip.create_model_from_pretrained("local-dir:PATH")` opens, or a Hub repository that
`hf-hub:NAME` names: configuration, weights of both halves, and the tokenizer where there is one.
"""

from __future__ import annotations

import copy
import functools
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kuea_mllm.errors import OutputError, TowerError
from kuea_mllm.io import disk_errors_named, read_json, write_json
from kuea_mllm.towers.files import checkpoints
from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.formats.open_clip_repository import read_open_clip_state, timm_trunk_facts
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.own_library import mlp_ratio
from kuea_mllm.towers.reading.text_half import (
    TOKENIZER_FILES,
    TextHalf,
    read_text_half,
    require_same_embedding,
    tokenizer_files,
)
from kuea_mllm.towers.spec import TowerSpec
from kuea_mllm.towers.writing.card import render_card
from kuea_mllm.towers.writing.save import SCHEMA_VERSION, export_visual, write_state

_WEIGHTS = checkpoints.OPEN_CLIP_WEIGHTS[0]
_RESIZE = {"shortest_edge": "shortest", "squash": "squash"}
# open_clip's own tokenizer, OpenAI's, which it takes where the configuration names none.
_OPENAI_VOCABULARY = 49408


@dataclass(frozen=True)
class OpenClipText:
    """The text half of an open_clip repository.

    Attributes:
        state: All tensors but those of `visual.*`, named as open_clip names them.
        model_cfg: The model's configuration; its vision half is that of the base and not used.
        activation: The activation that `model_cfg` stands for.
        tokenizer: Files to take along.
        source: Where it comes from.
    """

    state: Mapping[str, Any]
    model_cfg: Mapping[str, Any]
    activation: str
    tokenizer: tuple[Path, ...]
    source: str


def save_open_clip(
    tower: Tower, text: OpenClipText, directory: Path, *, manifest: Mapping[str, Any]
) -> None:
    """Write an open_clip repository; the directory may exist, its files may not.

    Args:
        tower: The vision tower; every tensor keeps its value and its dtype.
        text: The other half.
        directory: Where to write.
        manifest: Where the tower comes from; JSON values. Written to `kuea.json`, and as a card to
            `README.md`.

    Raises:
        TowerError: If open_clip has no such tower.
        TowerMismatch: If the text half embeds in another width.
        OutputError: If a file exists.
        EnvironmentFailure: If the disk is full.
    """
    visual = export_visual(tower)
    config = open_clip_config(tower, text)
    for name in (checkpoints.OPEN_CLIP_CONFIG, _WEIGHTS):
        if (directory / name).exists():
            raise OutputError(f"output {directory / name} exists already.")
    record = {
        "schema_version": SCHEMA_VERSION,
        **manifest,
        "fingerprint": tower.fingerprint,
        "spec": tower.spec.to_dict(),
    }
    with disk_errors_named(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / checkpoints.OPEN_CLIP_CONFIG, config)
        for path in text.tokenizer:
            shutil.copyfile(path, directory / path.name)
        write_json(directory / "kuea.json", record)
        card = render_card(record, library="open_clip")
        (directory / "README.md").write_text(card, encoding="utf-8")
    full = {keys.VISUAL_PREFIX + name: tensor for name, tensor in visual.items()} | dict(text.state)
    write_state(full, directory / _WEIGHTS)


def read_open_clip_text(base: str | Path, *, activation: str | None = None) -> OpenClipText:
    """Read a text half: from an open_clip repository as it is, otherwise as `read_text_half` does.

    Args:
        base: An open_clip repository, a full OpenAI or open_clip CLIP state dict, or a Hugging Face
            CLIP directory; directories also as Hub ids.
        activation: Activation of a state dict file, which states none; OpenAI's if left out.

    Raises:
        TowerError: If there is no text half that open_clip has the like of.
    """
    path = checkpoints.resolve_source(base, also=TOKENIZER_FILES)
    if path.is_dir() and checkpoints.is_open_clip_repository(path):
        return _read_repository(path)
    if path.is_file():
        names = checkpoints.read_checkpoint_file(path)
        if any(str(name).startswith(keys.VISUAL_PREFIX + keys.TRUNK_PREFIX) for name in names):
            raise TowerError(
                f"checkpoint {path} is a SigLIP of open_clip, whose text tower it does not "
                "describe: heads, pooling and mask are not in the weights.",
                "Give the whole repository, such as timm/ViT-SO400M-14-SigLIP.",
            )
    return _of_text_half(read_text_half(path, activation=activation))


def open_clip_config(tower: Tower, text: OpenClipText) -> dict[str, Any]:
    """Return the content of `open_clip_config.json`.

    Raises:
        TowerError: If open_clip has no such tower.
        TowerMismatch: If the text half embeds in another width.
    """
    spec = tower.spec
    model: dict[str, Any] = copy.deepcopy(dict(text.model_cfg))
    require_same_embedding(tower, int(model["embed_dim"]), text.source)
    if spec.family == "siglip":
        known = (model.get("vision_cfg") or {}).get("timm_model_name")
        model["vision_cfg"] = {
            "image_size": spec.image_size,
            "timm_model_name": _timm_name(tower, known),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
    else:
        model["vision_cfg"] = _vision_cfg(spec)
        _set_activation(model, spec, text, tower.source)
    preprocess = {
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": "bicubic",
        "resize_mode": _RESIZE[spec.resize],
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _vision_cfg(spec: TowerSpec) -> dict[str, Any]:
    vision: dict[str, Any] = {
        "image_size": spec.image_size,
        "layers": spec.layers,
        "width": spec.width,
        "head_width": spec.width // spec.heads,
        "patch_size": spec.patch_size,
        "mlp_ratio": mlp_ratio(spec),
    }
    if spec.layer_norm_eps != 1e-5:
        vision["norm_kwargs"] = {"eps": spec.layer_norm_eps}
    return vision


def _set_activation(
    model: dict[str, Any], spec: TowerSpec, text: OpenClipText, source: str
) -> None:
    """Set the one switch that open_clip has for both halves, and the approximation of each."""
    quick = {"vision": spec.activation == "quick_gelu", "text": text.activation == "quick_gelu"}
    if quick["vision"] != quick["text"]:
        raise TowerError(
            f"{source} has activation {spec.activation}, the text tower of {text.source} "
            f"{text.activation}; open_clip has one switch for both.",
            "Give the CLIP that the tower was made from.",
        )
    model["quick_gelu"] = quick["vision"]
    if spec.activation == "gelu_pytorch_tanh":
        model["vision_cfg"]["act_kwargs"] = {"approximate": "tanh"}


def _read_repository(directory: Path) -> OpenClipText:
    path = directory / checkpoints.OPEN_CLIP_CONFIG
    content = read_json(path)
    model = content.get("model_cfg", content)
    if not isinstance(model, dict) or not isinstance(model.get("text_cfg"), dict):
        raise TowerError(f"{path} holds no text_cfg.", "Is it an open_clip configuration?")
    state = {
        name: tensor
        for name, tensor in read_open_clip_state(directory).items()
        if not name.startswith(keys.VISUAL_PREFIX)
    }
    if not any("token_embedding" in name for name in state):
        raise TowerError(f"{directory} has no text tower: no key names a token_embedding.")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return OpenClipText(state, model, activation, tokenizer_files(directory), str(directory))


def _of_text_half(text: TextHalf) -> OpenClipText:
    # OpenAI's metadata is no part of an open_clip model.
    state = {name: t for name, t in text.state.items() if name not in keys.OPENAI_METADATA}
    config: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocabulary,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
    }
    if text.mlp_width != 4 * text.width:
        config["mlp_ratio"] = text.mlp_width / text.width
    if text.layer_norm_eps != 1e-5:
        config["norm_kwargs"] = {"eps": text.layer_norm_eps}
    if text.activation == "gelu_pytorch_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    if text.eos_id is not None:
        config |= {"pool_type": "eos", "eos_id": text.eos_id}
    has_own_tokenizer = bool(text.tokenizer) and text.vocabulary != _OPENAI_VOCABULARY
    if has_own_tokenizer:
        # Any name: of a local directory, open_clip takes the tokenizer beside the weights.
        config["hf_tokenizer_name"] = Path(text.source).name
    return OpenClipText(
        state,
        {"embed_dim": text.embedding_width, "text_cfg": config},
        text.activation,
        text.tokenizer if has_own_tokenizer else (),
        text.source,
    )


def _timm_name(tower: Tower, known: str | None) -> str:
    """Name the timm model that has exactly the sizes, heads, activation and epsilon of a tower."""
    spec = tower.spec
    wanted = (spec.image_size, spec.heads, spec.activation, spec.layer_norm_eps)
    shapes = {
        name.removeprefix(keys.TRUNK_PREFIX): tuple(tensor.shape)
        for name, tensor in export_visual(tower).items()
    }
    close = []
    for name in _siglip_models(known, spec.patch_size):
        found, of_model = _facts_and_shapes(name)
        if found == wanted and of_model == shapes:
            return name
        if of_model == shapes:
            close.append(f"{name} ({_in_words(found)})")
    raise TowerError(
        f"{tower.source} has {_in_words(wanted)}, and no SigLIP of timm is like that; open_clip "
        "knows SigLIP by timm's names only"
        + (f". Of the same shapes is {', '.join(close)}." if close else "."),
        "Write it with --to hf, which states them, or --to visual.",
    )


def _in_words(facts: tuple[int, int, str, float]) -> str:
    size, heads, activation, eps = facts
    return f"{size} pixels, {heads} heads, activation {activation}, epsilon {eps:g}"


def _siglip_models(known: str | None, patch_size: int) -> Iterator[str]:
    import timm

    if known is not None and timm.is_model(known):
        yield known
    for name in timm.list_models("*siglip*"):
        named = re.search(r"_patch(\d+)_", name)
        if name != known and "_gap_" not in name and not (named and int(named[1]) != patch_size):
            yield name


_NO_FACTS = (0, 0, "", 0.0)


@functools.lru_cache
def _facts_and_shapes(
    name: str,
) -> tuple[tuple[int, int, str, float], dict[str, tuple[int, ...]]]:
    import timm

    try:
        with torch.device("meta"):
            trunk: Any = timm.create_model(name, num_classes=0, global_pool="map")
        facts = timm_trunk_facts(trunk)
        height, width = trunk.patch_embed.img_size
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError, AssertionError):
        # A model of another kind, such as NaFlex's: not one that open_clip's SigLIP could be.
        return _NO_FACTS, {}
    if len(facts) != 1 or height != width:
        return _NO_FACTS, {}
    shapes = {key: tuple(tensor.shape) for key, tensor in trunk.state_dict().items()}
    return (int(height), *facts.pop()), shapes
