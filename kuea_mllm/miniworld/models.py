"""The architectures of the mini world: real classes, small numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kuea_mllm.miniworld.scenes import CANVAS, CELL
from kuea_mllm.miniworld.vocabularies import CLIP_CONTEXT, IMAGE_TOKEN, LLAVA_CONTEXT

if TYPE_CHECKING:
    from transformers import (
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
        Dinov2WithRegistersModel,
        LlamaTokenizer,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.image_processing_backends import PilBackend

CLIP_WIDTH = 64
TEACHER_WIDTH = 96
DECODER_WIDTH = 96
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Make an untrained CLIP; its weights come from torch's global random state."""
    from torch import nn
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=CANVAS,
        patch_size=CELL,
        projection_dim=CLIP_WIDTH,
        hidden_act="quick_gelu",
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_CONTEXT,
        projection_dim=CLIP_WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=CLIP_WIDTH
    )
    clip = CLIPModel(config)
    # At the usual scale places drown in the pixels. Captions never ask for them, so training would
    # not bring them up either, and a LLaVA could not point at anything.
    nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=0.5)
    return clip


def make_teacher() -> Dinov2WithRegistersModel:
    """Make an untrained teacher; its weights come from torch's global random state."""
    from torch import nn
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=TEACHER_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=CANVAS,
        patch_size=CELL,
        num_register_tokens=2,
    )
    teacher = Dinov2WithRegistersModel(config)
    # At the usual scale places drown in the pixels, and the teacher never learns to tell them.
    nn.init.trunc_normal_(teacher.embeddings.position_embeddings, std=0.3, a=-0.6, b=0.6)
    return teacher


def make_llava(clip: CLIPModel, tokenizer: LlamaTokenizer) -> LlavaForConditionalGeneration:
    """Make a LLaVA around the vision weights of `clip`; projector and decoder are untrained."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=DECODER_WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LLAVA_CONTEXT,
        rms_norm_eps=1e-5,
        # The usual 0.02 is meant for widths in the thousands.
        initializer_range=DECODER_WIDTH**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=clip.vision_model.config.to_dict(),
        text_config=text.to_dict(),
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        image_seq_length=(CANVAS // CELL) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    # Greedy, as LLaVA-1.5 is evaluated.
    llava.generation_config.do_sample = False
    llava.generation_config.bos_token_id = tokenizer.bos_token_id
    llava.generation_config.eos_token_id = tokenizer.eos_token_id
    llava.generation_config.pad_token_id = tokenizer.pad_token_id
    return llava


def make_clip_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Make the processor that is saved beside the CLIP."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    images = CLIPImageProcessorPil(
        size={"shortest_edge": CANVAS},
        crop_size={"height": CANVAS, "width": CANVAS},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    # Processors have no types.
    make: Any = CLIPProcessor
    processor: CLIPProcessor = make(image_processor=images, tokenizer=tokenizer)
    return processor


def make_teacher_processor() -> PilBackend:
    """Make the image processor that is saved beside the teacher."""
    from transformers import BitImageProcessorPil

    return BitImageProcessorPil(
        size={"shortest_edge": CANVAS},
        crop_size={"height": CANVAS, "width": CANVAS},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )


def make_llava_processor(tokenizer: LlamaTokenizer) -> LlavaProcessor:
    """Make the processor that is saved beside the LLaVA; it pads images to a square."""
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    images = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": CANVAS},
        crop_size={"height": CANVAS, "width": CANVAS},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    # The three numbers decide how many placeholders an image gets; without the last one it is one
    # too few.
    make: Any = LlavaProcessor
    processor: LlavaProcessor = make(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return processor
