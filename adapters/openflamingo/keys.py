"""Names of every tensor in the released files and in ours, one to one.

A released model is three files: the trained part (the "checkpoint": resampler, gated blocks and the
token embedding), a language model, and a CLIP tower in open_clip's layout. The tower's names are
those of `towers.formats.convert`. No torch here: only names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from kuea_mllm.errors import UserError

TOWER_PREFIX = "model.vision_tower."
EMBEDDING = "model.language_model.embed_tokens.weight"
# The output layer is the embedding; transformers stores one of the two.
OUTPUT = "lm_head.weight"
RELEASED_EMBEDDING = "lang_encoder.transformer.wte.weight"
LANGUAGE_MODEL_EMBEDDING = "transformer.wte.weight"

_RESAMPLER = "model.resampler."
_LAYER = "model.language_model.layers."
_BLOCK = "transformer.blocks."
_FEED_FORWARD = {
    "0.weight": "norm.weight",
    "0.bias": "norm.bias",
    "1.weight": "up_proj.weight",
    "3.weight": "down_proj.weight",
}
_PROJECTIONS = {
    "to_q.weight": "q_proj.weight",
    "to_kv.weight": "kv_proj.weight",
    "to_out.weight": "out_proj.weight",
}
# One layer of the resampler, of the gated blocks, of the language model: released -> ours.
_PERCEIVER_LAYER = {
    **{
        f"0.{norm}.{kind}": f"attention.{norm}.{kind}"
        for norm in ("norm_media", "norm_latents")
        for kind in ("weight", "bias")
    },
    **{f"0.{old}": f"attention.{new}" for old, new in _PROJECTIONS.items()},
    **{f"1.{old}": f"mlp.{new}" for old, new in _FEED_FORWARD.items()},
}
_GATED_BLOCK = {
    "attn_gate": "attention_gate",
    "ff_gate": "mlp_gate",
    "attn.norm.weight": "attention.norm.weight",
    "attn.norm.bias": "attention.norm.bias",
    **{f"attn.{old}": f"attention.{new}" for old, new in _PROJECTIONS.items()},
    **{f"ff.{old}": f"mlp.{new}" for old, new in _FEED_FORWARD.items()},
}
_MPT_LAYER = {
    "ln_1.weight": "norm_1.weight",
    "attn.Wqkv.weight": "attention.qkv_proj.weight",
    "attn.out_proj.weight": "attention.out_proj.weight",
    "ln_2.weight": "norm_2.weight",
    "mlp.mlp_up.weight": "mlp.up_proj.weight",
    "mlp.mlp_down.weight": "mlp.down_proj.weight",
}
_MPT_QK_NORM = {
    "attn.q_ln.weight": "attention.q_norm.weight",
    "attn.k_ln.weight": "attention.k_norm.weight",
}


def checkpoint_names(*, perceiver_depth: int, gated_layers: Iterable[int]) -> dict[str, str]:
    """Return the names of the trained part, released -> ours.

    Args:
        perceiver_depth: Layers of the resampler.
        gated_layers: Decoder layers with a gated block in front, numbered from 0.
    """
    names = {"perceiver.latents": f"{_RESAMPLER}latents", RELEASED_EMBEDDING: EMBEDDING}
    for kind in ("weight", "bias"):
        names[f"perceiver.norm.{kind}"] = f"{_RESAMPLER}norm.{kind}"
    for layer in range(perceiver_depth):
        for old, new in _PERCEIVER_LAYER.items():
            names[f"perceiver.layers.{layer}.{old}"] = f"{_RESAMPLER}layers.{layer}.{new}"
    for layer in gated_layers:
        block = f"lang_encoder.{_BLOCK}{layer}.gated_cross_attn_layer."
        for old, new in _GATED_BLOCK.items():
            names[block + old] = f"{_LAYER}{layer}.cross_attention.{new}"
    return names


def language_model_names(*, layers: int, qk_norm: bool) -> dict[str, str]:
    """Return the names of the language model without its embedding, released -> ours.

    The embedding is left out because the trained part brings its own, which replaces it.
    """
    names = {"transformer.ln_f.weight": "model.language_model.norm.weight"}
    inner = _MPT_LAYER | (_MPT_QK_NORM if qk_norm else {})
    for layer in range(layers):
        for old, new in inner.items():
            names[f"{_BLOCK}{layer}.{old}"] = f"{_LAYER}{layer}.{new}"
    return names


def perceiver_depth_of(names: Iterable[str]) -> int:
    """Return the number of resampler layers in a checkpoint, by its names."""
    return 1 + max(_numbers(names, r"perceiver\.layers\.(\d+)\."), default=-1)


def gated_layers_of(names: Iterable[str]) -> list[int]:
    """Return the decoder layers with a gated block in front, by a checkpoint's names."""
    pattern = rf"lang_encoder\.{re.escape(_BLOCK)}(\d+)\.gated_cross_attn_layer\."
    return sorted(_numbers(names, pattern))


def strip_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Return plain name -> name in the file.

    The first upload of the 3B checkpoint has a "module." before every name (open_flamingo issue
    210).

    Raises:
        UserError: If two names become the same.
    """
    plain: dict[str, str] = {}
    for name in names:
        short = name.removeprefix("module.")
        if short in plain:
            raise UserError(f"the checkpoint holds both {plain[short]} and {name}.")
        plain[short] = name
    return plain


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Make sure that a file holds exactly the names expected.

    Raises:
        UserError: Naming the first missing and the first unknown tensors.
    """
    found, expected = set(found), set(expected)
    problems = [
        f"{what} {len(names)} of them, such as {', '.join(sorted(names)[:3])}"
        for what, names in (
            ("it lacks tensors,", expected - found),
            ("it holds unknown tensors,", found - expected),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{where} is not what was expected: {'; '.join(problems)}.",
            "Every tensor has to be accounted for; check that checkpoint, language model and tower "
            "belong to the same release.",
        )


def rename(names: Mapping[str, str], state: Mapping[str, object], where: str) -> dict[str, object]:
    """Rename a state dict; strict in both directions.

    Args:
        names: Old -> new.
        state: Holds exactly the old names.
        where: What to call it in errors.

    Raises:
        UserError: If a name is missing or unknown.
    """
    check_names(state, names, where)
    return {new: state[old] for old, new in names.items()}


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}
