"""The other half of a CLIP: its text tower, read from any format, under OpenAI's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.io import read_json
from kuea_mllm.towers.files import checkpoints
from kuea_mllm.towers.formats import convert, keys
from kuea_mllm.towers.formats.open_clip_repository import read_open_clip_state
from kuea_mllm.towers.model.tower import Tower

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

OPENAI_ACTIVATION = "quick_gelu"
_OPENAI_HEAD_WIDTH = 64
# What a tokenizer may consist of; the formats that hold a text tower take it along.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)

_CUSTOM_TEXT = "text."
# Of open_clip's text_cfg: what `TextHalf` holds or the weights tell, and what has no effect on the
# embedding of a text. Anything else makes a text tower that only open_clip itself has.
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_WITHOUT_EFFECT = {"output_tokens", "tokenizer_kwargs", "hf_tokenizer_name", "pad_id"}
_TEXT_DEFAULTS: dict[str, Any] = {"pool_type": "argmax", "proj_type": "linear", "eos_id": 2}


@dataclass(frozen=True)
class TextHalf:
    """Everything of a CLIP model but its vision tower, under OpenAI's names.

    Attributes:
        state: Text tower, projection, logit scale, and OpenAI's metadata where the base has them.
        source: Where it comes from.
        activation: Name that transformers uses.
        heads: Number of attention heads.
        layer_norm_eps: Epsilon of every LayerNorm.
        eos_id: Token whose output is the embedding; None for the one with the largest id.
        tokenizer: Files of its tokenizer, where it comes with one.
    """

    state: Mapping[str, Any]
    source: str
    activation: str = OPENAI_ACTIVATION
    heads: int = 1
    layer_norm_eps: float = 1e-5
    eos_id: int | None = None
    tokenizer: tuple[Path, ...] = ()

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return int(self.state["ln_final.weight"].shape[0])

    @property
    def embedding_width(self) -> int:
        """Width of the shared embedding."""
        return int(self.state["text_projection"].shape[1])

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return convert.count_blocks(self.state, keys.VISUAL_BLOCK)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the blocks' MLP."""
        return int(self.state[f"{keys.VISUAL_BLOCK}0.mlp.c_fc.bias"].shape[0])

    @property
    def context_length(self) -> int:
        """Number of positions."""
        return int(self.state["positional_embedding"].shape[0])

    @property
    def vocabulary(self) -> int:
        """Number of tokens known."""
        return int(self.state["token_embedding.weight"].shape[0])


def read_text_half(base: str | Path, *, activation: str | None = None) -> TextHalf:
    """Read everything but the vision tower of a CLIP model, under OpenAI's names.

    Args:
        base: A full OpenAI or open_clip state dict file, an open_clip repository, or a Hugging Face
            CLIP directory; the latter two also as Hub ids.
        activation: Activation of a state dict file, which states none; OpenAI's if left out.

    Raises:
        TowerError: If there is no text half, or it is of another kind than CLIP's.
    """
    path = checkpoints.resolve_source(base, also=TOKENIZER_FILES)
    if path.is_file():
        half = _read_file(path, activation or OPENAI_ACTIVATION)
    elif checkpoints.is_open_clip_repository(path):
        half = _read_open_clip(path)
    else:
        half = _read_huggingface(path)
    missing = {*keys.TEXT_KEYS} - half.state.keys()
    if missing or not half.layers:
        raise TowerError(
            f"{path} has no complete text tower: it lacks "
            f"{', '.join(sorted(missing)) or keys.VISUAL_BLOCK + '*'}.",
            "Give a full CLIP: an OpenAI or open_clip state dict, or a Hugging Face directory.",
        )
    # Strict: names every key that is missing or too many.
    convert.openai_text_to_hf(half.state, str(path))
    return half


def text_config(text: TextHalf) -> CLIPTextConfig:
    """Return transformers' configuration of a text half."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=text.width,
        intermediate_size=text.mlp_width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        vocab_size=text.vocabulary,
        projection_dim=text.embedding_width,
        hidden_act=text.activation,
        layer_norm_eps=text.layer_norm_eps,
        # Where OpenAI's vocabulary has it; nothing reads it, but it has to be one of the tokens.
        bos_token_id=text.vocabulary - 2,
        # 2 makes transformers take the token with the largest id as the end, as OpenAI does.
        eos_token_id=2 if text.eos_id is None else text.eos_id,
    )


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """Return the files of a directory's tokenizer."""
    return tuple(directory / name for name in TOKENIZER_FILES if (directory / name).is_file())


def bare_text(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an open_clip state dict that are not the vision tower's, bare names."""
    # open_clip keeps the same text tower below "text." where the model is a CustomTextCLIP.
    return {
        name.removeprefix(_CUSTOM_TEXT): tensor
        for name, tensor in full.items()
        if not name.startswith(keys.VISUAL_PREFIX)
    }


def openai_heads(width: int) -> int:
    """Return the number of heads that OpenAI's format implies for a width."""
    return max(1, width // _OPENAI_HEAD_WIDTH)


def require_same_embedding(tower: Tower, width: int, where: str) -> None:
    """Refuse a text half that embeds in another width than a tower.

    Raises:
        TowerMismatch: If it does.
    """
    if width != tower.spec.embedding_width:
        raise TowerMismatch(
            f"{tower.source} embeds images in {tower.spec.embedding_width} numbers, the text tower "
            f"of {where} texts in {width}.",
            "Give the CLIP that the tower was made from.",
        )


def _read_file(path: Path, activation: str) -> TextHalf:
    content = checkpoints.read_checkpoint_file(path)
    if f"{keys.VISUAL_PREFIX}class_embedding" not in content:
        raise TowerError(
            f"checkpoint {path} is no full CLIP state dict: it holds no visual.class_embedding.",
            "Give the file with both halves, or a Hugging Face CLIP directory.",
        )
    state = bare_text(content)
    norm = state.get("ln_final.weight")
    heads = openai_heads(len(norm)) if isinstance(norm, Tensor) else 1
    return TextHalf(state, str(path), activation=activation, heads=heads)


def _read_open_clip(directory: Path) -> TextHalf:
    path = directory / checkpoints.OPEN_CLIP_CONFIG
    model = read_json(path).get("model_cfg", {})
    text = model.get("text_cfg") or {}
    act, norm = text.get("act_kwargs") or {}, text.get("norm_kwargs") or {}
    for key, value in text.items():
        is_default = value in (None, False) or _TEXT_DEFAULTS.get(key) == value
        known = _PLAIN_TEXT | _WITHOUT_EFFECT | {"act_kwargs", "norm_kwargs", "eos_id"}
        if key not in known and not is_default:
            raise TowerError(
                f"{path}: text_cfg.{key} is {value!r}, for which OpenAI's CLIP has no counterpart.",
                "Take the text tower of a plain CLIP; --to open_clip keeps such a text tower.",
            )
    state = bare_text(read_open_clip_state(directory))
    if "logit_bias" in state:
        raise TowerError(
            f"{directory} is a SigLIP: it has a logit_bias, for which CLIP has no counterpart.",
            "Take the text tower of a CLIP; --to open_clip keeps that of a SigLIP.",
        )
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if act.get("approximate", "none") != "none":
        activation = f"gelu_pytorch_{act['approximate']}"
    return TextHalf(
        state,
        str(directory),
        activation=activation,
        heads=int(text.get("heads", 8)),
        layer_norm_eps=float(norm.get("eps", 1e-5)),
        eos_id=text.get("eos_id") if text.get("pool_type") == "eos" else None,
        tokenizer=tokenizer_files(directory),
    )


def _read_huggingface(directory: Path) -> TextHalf:
    from transformers import CLIPTextConfig

    config = checkpoints.read_config(directory)
    if config.get("model_type") != "clip":
        raise TowerError(
            f"{directory} holds a model of type {config.get('model_type')!r}, not a full CLIP with "
            "a text tower.",
            "Give the directory of a CLIPModel, such as openai/clip-vit-large-patch14; for SigLIP "
            "an open_clip repository, such as timm/ViT-SO400M-14-SigLIP.",
        )
    stated = config.get("text_config") or {}
    skipped = {"model_type", "transformers_version"}
    text: Any = CLIPTextConfig(**{k: v for k, v in stated.items() if k not in skipped})
    weights = checkpoints.read_directory_weights(
        directory,
        lambda name: convert.is_other_half(name) and not name.endswith(keys.IGNORED_SUFFIX),
    )
    # transformers: 2, a mistake in OpenAI's own configurations, means the largest id.
    eos = text.eos_token_id
    if not isinstance(eos, int):
        raise TowerError(
            f"{directory / 'config.json'}: text_config.eos_token_id is {eos!r}, not one token.",
            "State the token whose output is the embedding of a text.",
        )
    return TextHalf(
        convert.hf_text_to_openai(weights, str(directory)),
        str(directory),
        activation=str(text.hidden_act),
        heads=int(text.num_attention_heads),
        layer_norm_eps=float(text.layer_norm_eps),
        eos_id=None if eos in (2, text.vocab_size - 1) else eos,
        tokenizer=tokenizer_files(directory),
    )
