"""LLaVA in its authors' own layout: what its `config.json` says, and which tower its loader takes.

`build_vision_tower` of the original code fetches `mm_vision_tower` by that name or path after the
weights are loaded, and drops tower tensors that lie in the weight files; only a configuration with
`unfreeze_mm_vision_tower` builds the tower first, so that the tensors in the files win
(haotian-liu/LLaVA, llava/model/multimodal_encoder/clip_encoder.py). It takes an existing path, or a
name that begins with "openai" or "laion".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.base import NAMED_TOWER_DIRECTORY, Tap, TowerReference, TowerSlot
from kuea_mllm.adapters.named_tower import local_directory
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import INDEX_FILE, SINGLE_FILE, channel_values, image_settings
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD

TOWER_KEY = "mm_vision_tower"
UNFREEZE_KEY = "unfreeze_mm_vision_tower"
# Path of the tower's body in a loaded model: the wrapper and the CLIPVisionModel have one name.
TOWER_MODULE = "model.vision_tower.vision_tower"

_MODEL_TYPES = ("llava", "llava_llama")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

# Published configurations of the two towers that LLaVA was trained with, for machines without them.
_VIT_L: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
_PUBLISHED_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14": {**_VIT_L, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_VIT_L, "image_size": 336},
}
_SELECTS_PATCHES = {"patch": True, "cls_patch": False}


@dataclass(frozen=True)
class TowerDescription:
    """A referenced tower as far as it is known without fetching it.

    Attributes:
        config: Keys as in `transformers.CLIPVisionConfig`, defaults filled in.
        mean: Channel means of its image processor.
        std: Channel deviations.
        directory: Where it lies on this machine, None if it does not. Of a repository in the cache
            perhaps its configuration only.
    """

    config: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    directory: Path | None


def is_original(config: Mapping[str, object]) -> bool:
    """Say whether a `config.json` is LLaVA in its original layout.

    The original code writes model_type "llava_llama", older releases "llava" with fields of their
    own; transformers would load the latter with random weights.
    """
    model_type = config.get("model_type")
    return model_type == "llava_llama" or (model_type == "llava" and TOWER_KEY in config)


def check_original(base: Path) -> None:
    """Make sure that a directory in the original layout is a whole model.

    Raises:
        UserError: Naming what is missing, or what kind of part it is.
    """
    from kuea_mllm.towers.files.shards import loaded_shards

    original_config(base)
    if (base / "adapter_config.json").is_file() or (base / "non_lora_trainables.bin").is_file():
        raise UserError(
            f"{base} holds LoRA weights of LLaVA, not a whole model.",
            "Convert them (`kuea-mllm convert DIR NEW --mllm llava`), then `kuea-mllm merge` them "
            "into the converted base.",
        )
    has_weights = any(base.glob("*.safetensors")) or any(base.glob("pytorch_model*"))
    if (base / "mm_projector.bin").is_file() and not has_weights:
        raise UserError(
            f"{base} holds only a projector (mm_projector.bin): it is LLaVA's pretraining stage, "
            "without a language model.",
            "Give the directory of a fine-tuned LLaVA, such as liuhaotian/llava-v1.5-7b.",
        )
    loaded_shards(base)
    if not any((base / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{base} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there.",
            "Give a complete model directory; if it is a download, run the download again.",
        )


def original_config(base: Path) -> Mapping[str, Any]:
    """Read `config.json` of a directory in the original layout.

    Raises:
        UserError: If it is another layout, or its language model is not Llama.
    """
    config = read_model_config(base)
    where = base / "config.json"
    if config.get("model_type") not in _MODEL_TYPES or not isinstance(config.get(TOWER_KEY), str):
        raise UserError(
            f"{where} is not LLaVA in its original layout: model_type is "
            f"{config.get('model_type')!r}, {TOWER_KEY} is {config.get(TOWER_KEY)!r}.",
            "Its configuration names a vision tower, as in liuhaotian/llava-v1.5-7b.",
        )
    architectures = config.get("architectures") or ["LlavaLlamaForCausalLM"]
    if architectures != ["LlavaLlamaForCausalLM"]:
        raise UserError(
            f"{where} asks for {architectures}, only LlavaLlamaForCausalLM is supported.",
            "LLaVA on top of another language model (MPT, Mistral, Qwen) is another architecture.",
        )
    return config


def original_slot(base: Path) -> TowerSlot:
    """Describe the tower that the original loader puts into a model.

    Raises:
        UserError: If the reference cannot be read here, or the tower is used in a way that a swap
            cannot keep.
    """
    config = original_config(base)
    where = base / "config.json"
    if config.get("s2"):
        raise UserError(
            f"{where} runs its tower at several scales (s2), which cannot be swapped.",
            "Give a LLaVA that reads its tower at one scale.",
        )
    layer, drops_cls = selected_tokens(config, where)
    tower = describe_tower(str(config[TOWER_KEY]), where)
    width = config.get("mm_hidden_size")
    reference: TowerReference | None = TowerReference(
        "config.json", TOWER_KEY, str(config[TOWER_KEY])
    )
    if config.get(UNFREEZE_KEY):
        # The loader then reads the tower out of the weight files.
        reference = None
        if not any((base / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
            raise UserError(
                f"{where} says {UNFREEZE_KEY}, so that its loader reads the tower out of the "
                "weight files, which are no safetensors.",
                "Convert the model first: kuea-mllm convert SOURCE NEW --mllm llava.",
            )
    return TowerSlot(
        vision_config=tower.config,
        module=TOWER_MODULE,
        tap=Tap((layer,), drops_cls=drops_cls),
        family="clip",
        mean=tower.mean,
        std=tower.std,
        projector_width=width if isinstance(width, int) else None,
        reference=reference,
    )


def selected_tokens(config: Mapping[str, Any], where: Path) -> tuple[int, bool]:
    """Return which layer the model reads, and whether the class token is left out.

    Raises:
        UserError: If the configuration does not say it in a known way.
    """
    layer = config.get("mm_vision_select_layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise UserError(
            f"{where}: mm_vision_select_layer is {layer!r}, not a number.", "LLaVA-1.5 has -2."
        )
    # The original code's own default.
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in _SELECTS_PATCHES:
        raise UserError(
            f"{where}: mm_vision_select_feature is {feature!r}.",
            f"Known are: {', '.join(_SELECTS_PATCHES)}.",
        )
    return layer, _SELECTS_PATCHES[feature]


def describe_tower(name: str, where: Path) -> TowerDescription:
    """Describe the tower that a configuration names, without going to the network.

    Looked for as the original loader does: a path first, then (in the local cache) a Hub id. The
    two towers of the published LLaVA are known without files, and a model that was moved after a
    swap is described by the tower beside it.

    Raises:
        UserError: If it cannot be described here.
    """
    directory = local_directory(name)
    moved = where.parent / NAMED_TOWER_DIRECTORY
    if directory is None and name not in _PUBLISHED_TOWERS and (moved / "config.json").is_file():
        # The model was moved after a swap: the tower came along, the path that names it did not.
        directory = moved
    if directory is None:
        published = _PUBLISHED_TOWERS.get(name)
        if published is None:
            raise UserError(
                f"{where} names the vision tower {name!r}, which is neither a directory nor in the "
                "local Hugging Face cache, so its architecture is not known.",
                f"Fetch it first (`hf download {name}`), or correct {TOWER_KEY} if it is a path.",
            )
        return TowerDescription(_filled(published, where), CLIP_MEAN, CLIP_STD, None)
    content = read_model_config(directory)
    section = content.get("vision_config") if content.get("model_type") == "clip" else content
    if not isinstance(section, Mapping) or "clip" not in str(content.get("model_type")):
        raise UserError(
            f"{directory}, the tower that {where} names, is a {content.get('model_type')!r}.",
            "The original LLaVA loads CLIP towers only.",
        )
    settings = image_settings(directory)
    return TowerDescription(
        _filled(section, directory / "config.json"),
        channel_values(settings, "image_mean", directory) or CLIP_MEAN,
        channel_values(settings, "image_std", directory) or CLIP_STD,
        directory,
    )


def _filled(section: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    from transformers import CLIPVisionConfig

    skipped = {"model_type", "transformers_version", "torch_dtype", "dtype", "architectures"}
    make: Any = CLIPVisionConfig
    try:
        config = make(**{k: v for k, v in section.items() if k not in skipped})
    # transformers validates with exception types of its own.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"file {where} is no valid CLIP configuration: {reason}.") from error
    filled: dict[str, Any] = config.to_dict()
    return filled
