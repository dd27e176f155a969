"""Tiny random VLMs of many classes of transformers, complete as model directories."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AyaVisionConfig,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    DeepseekVLConfig,
    DeepseekVLHybridConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Granite4VisionConfig,
    Granite4VisionTextConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    ModernBertConfig,
    ModernVBertConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    T5Gemma2Config,
    UltraVBertConfig,
    VideoLlavaConfig,
    VipLlavaConfig,
)

from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD

WIDTH = 16
SHARED: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE_TOKEN = 340


def clip(**changes: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{**SHARED, "projection_dim": 8, **changes})


def siglip(**changes: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(**{**SHARED, **changes})


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**TEXT, **changes})


def _cohere(**changes: Any) -> Cohere2Config:
    return Cohere2Config(**{**TEXT, "sliding_window": 16, "layer_types": None, **changes})


PINPOINTS = [[16, 32], [32, 16]]


def _llava(**changes: Any) -> PreTrainedConfig:
    return LlavaConfig(
        vision_config=siglip(), text_config=llama(), image_token_index=IMAGE_TOKEN, **changes
    )


def _llava_next(**changes: Any) -> PreTrainedConfig:
    return LlavaNextConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )


def _llava_next_video(**changes: Any) -> PreTrainedConfig:
    return LlavaNextVideoConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )


def _llava_onevision(**changes: Any) -> PreTrainedConfig:
    # Without a pooling head, as its releases are.
    return LlavaOnevisionConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=llama(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )


def _vipllava(**changes: Any) -> PreTrainedConfig:
    return VipLlavaConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=[-2, 1],
        **changes,
    )


def _video_llava(**changes: Any) -> PreTrainedConfig:
    return VideoLlavaConfig(
        vision_config=clip(), text_config=llama(), image_token_index=IMAGE_TOKEN, **changes
    )


def _paligemma(**changes: Any) -> PreTrainedConfig:
    return PaliGemmaConfig(
        vision_config=siglip(vision_use_head=False, projection_dim=32),
        text_config=Gemma2Config(**{**TEXT, "query_pre_attn_scalar": 16}),
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        **changes,
    )


def _gemma3(**changes: Any) -> PreTrainedConfig:
    return Gemma3Config(
        vision_config=siglip(vision_use_head=False),
        text_config=Gemma3TextConfig(**{**TEXT, "query_pre_attn_scalar": 16}),
        image_token_index=IMAGE_TOKEN,
        boi_token_index=341,
        eoi_token_index=342,
        mm_tokens_per_image=4,
        **changes,
    )


def _aya_vision(**changes: Any) -> PreTrainedConfig:
    return AyaVisionConfig(
        vision_config=siglip(),
        text_config=_cohere(),
        image_token_index=IMAGE_TOKEN,
        alignment_intermediate_size=24,
        **changes,
    )


def _cohere2_vision(**changes: Any) -> PreTrainedConfig:
    return Cohere2VisionConfig(
        vision_config=siglip(),
        text_config=_cohere(),
        alignment_intermediate_size=24,
        **{"image_token_id": IMAGE_TOKEN, **changes},
    )


def _granite4_vision(**changes: Any) -> PreTrainedConfig:
    return Granite4VisionConfig(
        vision_config=siglip(hidden_size=64),
        text_config=Granite4VisionTextConfig(**{**TEXT, "num_hidden_layers": 4}),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0], [1, 1]],
        spatial_vision_layer=-1,
        spatial_target_layers=[0, 1, 2, 3],
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
        **changes,
    )


def _deepseek_vl(**changes: Any) -> PreTrainedConfig:
    return DeepseekVLConfig(
        vision_config=siglip(), text_config=llama(), **{"image_token_id": IMAGE_TOKEN, **changes}
    )


def _deepseek_vl_hybrid(**changes: Any) -> PreTrainedConfig:
    return DeepseekVLHybridConfig(
        vision_config=siglip(),
        text_config=llama(),
        high_res_vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
            "num_pos_feats": 4,
        },
        **{"image_token_id": IMAGE_TOKEN, **changes},
    )


def _modernvbert(**changes: Any) -> PreTrainedConfig:
    special = {"cls_token_id": 1, "sep_token_id": 2}
    return ModernVBertConfig(
        vision_config=siglip(),
        text_config=ModernBertConfig(**{**TEXT, **special}),
        pixel_shuffle_factor=2,
        image_token_id=IMAGE_TOKEN,
        **changes,
    )


def _ultravbert(**changes: Any) -> PreTrainedConfig:
    return UltraVBertConfig(
        vision_config=siglip(vision_use_head=False),
        text_config={**TEXT, "model_type": "ultrabert"},
        pixel_shuffle_factor=2,
        image_token_id=IMAGE_TOKEN,
        **changes,
    )


def _t5gemma2(**changes: Any) -> PreTrainedConfig:
    text = {**TEXT, "query_pre_attn_scalar": 16}
    return T5Gemma2Config(
        encoder={
            "text_config": text,
            "vision_config": siglip(vision_use_head=False).to_dict(),
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 341,
            "eoi_token_index": 342,
        },
        decoder=text,
        image_token_index=IMAGE_TOKEN,
        eoi_token_index=342,
        **changes,
    )


CONFIGS: Mapping[str, Callable[..., PreTrainedConfig]] = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "LlavaNextVideoForConditionalGeneration": _llava_next_video,
    "LlavaOnevisionForConditionalGeneration": _llava_onevision,
    "VipLlavaForConditionalGeneration": _vipllava,
    "VideoLlavaForConditionalGeneration": _video_llava,
    "PaliGemmaForConditionalGeneration": _paligemma,
    "Gemma3ForConditionalGeneration": _gemma3,
    "AyaVisionForConditionalGeneration": _aya_vision,
    "Cohere2VisionForConditionalGeneration": _cohere2_vision,
    "Granite4VisionForConditionalGeneration": _granite4_vision,
    "DeepseekVLForConditionalGeneration": _deepseek_vl,
    "DeepseekVLHybridForConditionalGeneration": _deepseek_vl_hybrid,
    "ModernVBertForMaskedLM": _modernvbert,
    "UltraVBertForMaskedLM": _ultravbert,
    "T5Gemma2ForConditionalGeneration": _t5gemma2,
}


def make_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """Build a model of that class with random weights that all matter."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(CONFIGS[name](**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_tokenizer() -> Any:
    """A tokenizer that spells out what it is given; `<pad>` and `<image>` come last."""
    letters = "▁" + string.ascii_letters + string.digits + string.punctuation
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokenizer: Any = LlamaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    return tokenizer


def write_directory(model: Any, out: Path, **options: Any) -> Path:
    """Save a model with stand-ins for tokenizer and processor, enough for a swap."""
    model.save_pretrained(out, **options)
    (out / "tokenizer.json").write_text("{}")
    is_siglip = "siglip_vision_model" in (out / "config.json").read_text()
    mean, std = (SIGLIP_MEAN, SIGLIP_STD) if is_siglip else (CLIP_MEAN, CLIP_STD)
    settings = {"image_mean": list(mean), "image_std": list(std)}
    (out / "preprocessor_config.json").write_text(json.dumps(settings))
    return out


def to_older_layout(directory: Path) -> Path:
    """Rename the tensors on disk to what transformers 4 wrote: one more `vision_model.` level."""
    renamed: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state = {_older_name(name): tensor for name, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
        renamed |= dict.fromkeys(state, file.name)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {}, "weight_map": renamed}))
    return directory


def _older_name(name: str) -> str:
    for tower in ("vision_tower.", "image_tower.", "video_tower.", "model.vision_model."):
        head, found, tail = name.partition(tower)
        if found:
            return f"{head}{tower}vision_model.{tail}"
    return name
