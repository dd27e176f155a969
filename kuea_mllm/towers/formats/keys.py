"""Names of the same tensor in the layouts in circulation.

Canonical names are those of transformers *without* the `vision_model.` prefix: what
`CLIPVisionModel` and `SiglipVisionModel` of transformers >= 5 call their tensors. Tensors that are
cut or stacked on the way (query, key, value) and the projection are handled in `convert`.
"""

from __future__ import annotations

HF_PREFIX = "vision_model."
PROJECTION = "visual_projection.weight"
HF_BLOCK = "encoder.layers."

# Buffers that older transformers stored with the weights; they count 0, 1, 2, ...
IGNORED_SUFFIX = "embeddings.position_ids"

# Full open_clip/OpenAI CLIP state dicts keep the vision half under this prefix.
VISUAL_PREFIX = "visual."
VISUAL_BLOCK = "transformer.resblocks."

# open_clip visual name -> canonical name. "pre_layrnorm" is the spelling of transformers.
CLIP_OUTER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}

# Inside one open_clip block, for the vision and the text half alike.
CLIP_BLOCK_MODULES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# Text half of an OpenAI full dict -> CLIPTextModelWithProjection; `text_projection` is transposed.
TEXT_OUTER = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TEXT_KEYS = (*TEXT_OUTER, "text_projection", "logit_scale")
# Numbers that OpenAI's own archives carry beside the weights.
OPENAI_METADATA = ("input_resolution", "context_length", "vocab_size")

TRUNK_PREFIX = "trunk."
TRUNK_BLOCK = "blocks."
# timm name (below "trunk.") -> canonical name. Shapes of `pos_embed` differ by a leading 1.
SIGLIP_OUTER = {
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "pos_embed": "embeddings.position_embedding.weight",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj.weight": "head.attention.out_proj.weight",
    "attn_pool.proj.bias": "head.attention.out_proj.bias",
    "attn_pool.norm.weight": "head.layernorm.weight",
    "attn_pool.norm.bias": "head.layernorm.bias",
    "attn_pool.mlp.fc1.weight": "head.mlp.fc1.weight",
    "attn_pool.mlp.fc1.bias": "head.mlp.fc1.bias",
    "attn_pool.mlp.fc2.weight": "head.mlp.fc2.weight",
    "attn_pool.mlp.fc2.bias": "head.mlp.fc2.bias",
}
SIGLIP_BLOCK_MODULES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
