"""What the configuration of an original LLaVA means, as the files of the Hugging Face form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.llava.original import selected_tokens
from kuea_mllm.adapters.llava.original_tokenizer import TokenIds
from kuea_mllm.adapters.llava.prompt import IMAGE_TAG, SYSTEM, TURN_END
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json, write_json, write_text

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as stored in a preprocessor_config.json

# Llama's fields with the defaults of the transformers that LLaVA was made with. All are written,
# because LlavaConfig has defaults of its own in other releases.
_TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_cache": True,
    "tie_word_embeddings": False,
}
# Key -> values that the Hugging Face form can express; the first is what a missing key means.
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("square", None, "pad"),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (True, False),
    "mm_resampler_type": (None, False),
    "s2": (False, None),
    "quantization_config": (None,),
    "hidden_act": ("silu",),
}
# Supported values that only a missing key has, and that are refused all the same.
_REFUSED = {"mm_projector_type": "linear", "mm_use_im_patch_token": True}
_USED = {
    *("architectures", "model_type", "torch_dtype", "dtype", "mm_vision_tower", "mm_hidden_size"),
    *("mm_vision_select_layer", "mm_vision_select_feature", "unfreeze_mm_vision_tower"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
# Of training, of the code's own bookkeeping, or (pretraining_tp) without effect on the result.
_WITHOUT_EFFECT = {
    *("_name_or_path", "transformers_version", "pretraining_tp", "use_mm_proj", "auto_map"),
    *("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "mm_projector_lr", "mm_vision_tower_lr"),
    *("freeze_mm_vision_resampler", "tune_mm_vision_resampler", "tune_mm_vision_tower"),
    *("mm_tunable_parts", "freeze_backbone", "tokenizer_model_max_length"),
    *("tokenizer_padding_side", "image_grid_pinpoints", "image_crop_resolution"),
    *("image_split_resolution",),
}
_CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '@SYSTEM@' %}{%- set turns = messages %}{%- endif %}"
    "{{- system if system is string else system[0]['text'] }}{{- ' ' }}"
    "{%- for turn in turns %}"
    "{{- 'USER: ' if turn['role'] == 'user' else 'ASSISTANT: ' }}"
    "{%- if turn['content'] is string %}{{- turn['content'] }}"
    "{%- else %}"
    "{%- for part in turn['content'] if part['type'] == 'image' %}{{- '@IMAGE@\\n' }}{%- endfor %}"
    "{%- for part in turn['content'] if part['type'] == 'text' %}{{- part['text'] }}{%- endfor %}"
    "{%- endif %}"
    "{{- ' ' if turn['role'] == 'user' else '@END@' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
)


def text_settings(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the language model's configuration, defaults filled in.

    Raises:
        UserError: If the configuration asks for what LLaVA in Hugging Face form does not have.
    """
    for key, values in _SUPPORTED.items():
        value = config.get(key, values[0])
        if value not in values or (key in _REFUSED and value == _REFUSED[key]):
            wanted = [known for known in values if known not in (None, _REFUSED.get(key))]
            raise UserError(
                f"{where}: {key} is {value!r}{'' if key in config else ' (not stated)'}, which "
                "LLaVA-1.5 in Hugging Face form cannot express.",
                f"Supported: {', '.join(map(repr, wanted)) or 'leaving it out'}. LLaVA-1.5 7B and "
                "13B can be converted; LLaVA-1.6 exists as llava-hf/llava-v1.6-*.",
            )
    known = {*_SUPPORTED, *_TEXT_DEFAULTS, *_USED, *_WITHOUT_EFFECT}
    strange = [key for key in config if "mm_" in key and key not in known and config[key]]
    if strange:
        raise UserError(
            f"{where}: {strange[0]} is {config[strange[0]]!r}, which is not known here.",
            "It may change the model; only what LLaVA-1.5 has can be converted.",
        )
    text = {key: config.get(key, default) for key, default in _TEXT_DEFAULTS.items()}
    if text["num_key_value_heads"] is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if text["rope_scaling"] is None:
        del text["rope_scaling"]
    return {"model_type": "llama", **text}


def keys_left_out(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a configuration that have no counterpart and are not known."""
    return sorted(config.keys() - {*_SUPPORTED, *_TEXT_DEFAULTS, *_USED, *_WITHOUT_EFFECT})


def model_config(
    config: Mapping[str, Any],
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    ids: TokenIds,
    *,
    vocabulary: int,
    dtype: str,
    where: Path,
) -> dict[str, Any]:
    """Return `config.json` of the Hugging Face form."""
    layer, drops_cls = selected_tokens(config, where)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    wanted = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"),
        *("attention_dropout", "projection_dim"),
    )
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": ids.image,
        "image_seq_length": patches + int(not drops_cls),
        "pad_token_id": ids.pad,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if drops_cls else "full",
        "tie_word_embeddings": text["tie_word_embeddings"],
        # transformers 4 knows the first name, 5 both.
        "torch_dtype": dtype,
        "dtype": dtype,
        "text_config": {**text, "vocab_size": vocabulary, "torch_dtype": dtype, **special},
        "vision_config": {"model_type": "clip_vision_model", **{k: vision[k] for k in wanted}},
    }


def image_processor(
    config: Mapping[str, Any], size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Any]:
    """Return the image processor that does what the original preprocessing does."""
    return {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        # With the colour of the mean, which is the image processor's own choice too.
        "do_pad": config.get("image_aspect_ratio") == "pad",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def write_processor(out: Path, images: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Write the processor's files: where transformers 5 and where transformers 4 looks for them."""
    write_json(out / "preprocessor_config.json", images)
    write_json(
        out / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_TAG,
            "patch_size": model["vision_config"]["patch_size"],
            "vision_feature_select_strategy": model["vision_feature_select_strategy"],
            # The class token; without it one placeholder too few is written.
            "num_additional_image_tokens": 1,
            "image_processor": dict(images),
        },
    )
    template = _CHAT_TEMPLATE.replace("@SYSTEM@", SYSTEM.replace("'", "\\'"))
    template = template.replace("@IMAGE@", IMAGE_TAG).replace("@END@", TURN_END)
    write_text(out / "chat_template.jinja", template)


def write_generation_config(source: Path, out: Path, ids: TokenIds, vocabulary: int) -> None:
    """Write `generation_config.json`: greedy unless the original samples.

    Ids that no text has are suppressed, because their rows in the padded output layer are filling.
    """
    path = source / "generation_config.json"
    stated = read_json(path) if path.is_file() else {}
    sampling: dict[str, Any] = {}
    if isinstance(stated, dict) and stated.get("do_sample"):
        wanted = ("do_sample", "temperature", "top_p", "top_k")
        sampling = {key: stated[key] for key in wanted if stated.get(key) is not None}
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": ids.bos,
            "eos_token_id": ids.eos,
            "pad_token_id": ids.pad,
            **sampling,
            "suppress_tokens": list(range(ids.known, vocabulary)),
        },
    )
