"""A text tower that embeds texts, whatever format its weights come in.

CLIP halves run in transformers, open_clip repositories in open_clip's own text transformer (which
has every variant that its configurations know, SigLIP's included).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from kuea_mllm.errors import TowerError
from kuea_mllm.io import read_json
from kuea_mllm.towers.files import checkpoints
from kuea_mllm.towers.formats import convert, keys
from kuea_mllm.towers.formats.open_clip_repository import read_open_clip_state
from kuea_mllm.towers.model.fingerprint import fingerprint_tensors
from kuea_mllm.towers.reading.text_half import (
    TOKENIZER_FILES,
    bare_text,
    read_text_half,
    text_config,
    tokenizer_files,
)

Tokenize = Callable[[list[str]], Tensor]
# Tokens (n, context_length) to the position (n,) at which a causal model reads its embedding.
ReadAt = Callable[[Tensor], Tensor]

TEXTS_AT_ONCE = 256
# OpenAI's byte pairs, which open_clip carries along; every model of that vocabulary uses them.
_OPENAI_VOCABULARY = 49408
_LEAST_VOCABULARY = 0.9
_OLD_EOS = 2
_WHOLE_MODELS = ("clip", "siglip")
_NO_TEXT = "Give the full CLIP that the tower was made from, such as openai/clip-vit-large-patch14."


class TextTower:
    """A frozen text tower with its tokenizer.

    Attributes:
        source: Where it comes from.
        fingerprint: Hash of the weights, of what they do not state, and of the tokenizer.
        context_length: Tokens of a text; what is longer is cut.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenize: Tokenize,
        *,
        source: str,
        fingerprint: str,
        context_length: int,
        read_at: ReadAt | None = None,
    ) -> None:
        self._module, self._tokenize = module.eval().requires_grad_(False), tokenize
        self._read_at = read_at
        self.source, self.fingerprint = source, fingerprint
        self.context_length = context_length
        self._device = torch.device("cpu")
        self._width: int | None = None

    @property
    def width(self) -> int:
        """Width of an embedding."""
        if self._width is None:
            self._width = int(self.encode([""]).shape[1])
        return self._width

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; embeddings always come back on the CPU."""
        self._device = torch.device(device)
        self._module.to(self._device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        A causal model sees nothing behind the token at which it is read, so texts of like length
        are embedded together and cut there: a prompt has a dozen tokens of 77. A text that is there
        several times is embedded once, so that rounding cannot part equal ones.

        Returns:
            (n, width), float32, on the CPU, not normalised.
        """
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        all_rows = self._encode_distinct(list(place))
        return all_rows[torch.tensor([place[text] for text in texts])]

    def _encode_distinct(self, texts: list[str]) -> Tensor:
        pieces = [texts[i : i + TEXTS_AT_ONCE] for i in range(0, len(texts), TEXTS_AT_ONCE)]
        tokens = torch.cat([self._tokenize(piece) for piece in pieces])
        lengths = torch.full((len(tokens),), tokens.shape[1])
        if self._read_at is not None:
            lengths = self._read_at(tokens) + 1
        rows = torch.split(lengths.argsort(stable=True), TEXTS_AT_ONCE)
        parts = [self._module(tokens[r, : lengths[r[-1]]].to(self._device)) for r in rows]
        embedded = torch.cat([part.float().cpu() for part in parts])
        return embedded[torch.cat(rows).argsort()]


def has_text_tower(path: Path) -> bool:
    """Tell whether a file or directory on disk is a whole CLIP or SigLIP with a text tower."""
    if path.is_file():
        return _names_tokens(checkpoints.read_checkpoint_file(path))
    if checkpoints.is_open_clip_repository(path):
        return _names_tokens(read_open_clip_state(path))
    return checkpoints.read_config(path).get("model_type") in _WHOLE_MODELS


def load_text_tower(
    base: str | Path, *, revision: str | None = None, activation: str | None = None
) -> TextTower:
    """Load the text tower of a whole CLIP or SigLIP, in float32 on the CPU.

    Args:
        base: A full OpenAI or open_clip state dict file, an open_clip repository, or a Hugging Face
            directory of a CLIPModel or SiglipModel; directories also as Hub ids.
        revision: Branch, tag or commit of a Hub id.
        activation: Activation of a state dict file, which states none; OpenAI's if left out.

    Raises:
        TowerError: If it has no text tower or no tokenizer, or is of an unknown kind.
    """
    path = checkpoints.resolve_source(base, revision=revision, also=TOKENIZER_FILES)
    if path.is_dir() and checkpoints.is_open_clip_repository(path):
        return _open_clip(path, str(base))
    if path.is_dir() and checkpoints.read_config(path).get("model_type") == "siglip":
        return _siglip(path, str(base))
    return _clip(path, str(base), activation)


class _Pooled(nn.Module):
    """A text model of transformers that returns embeddings alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        # No mask: CLIP reads its output at the end token, before any padding, and SigLIP was
        # trained without.
        output: Any = self.model(input_ids=tokens)
        embeds = getattr(output, "text_embeds", None)
        return cast(Tensor, output.pooler_output if embeds is None else embeds)


class _First(nn.Module):
    """A text transformer of open_clip that returns embeddings alone.

    Attributes:
        read_at: Where it is read, if it is causal and read at a token of the text.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.read_at: ReadAt | None = None
        # An appended class token (CoCa) is read behind all padding.
        if model.attn_mask is not None and model.cls_emb is None:
            self.read_at = {"argmax": _highest, "eos": _first_of(model.eos_id)}.get(model.pool_type)

    def forward(self, tokens: Tensor) -> Tensor:
        mask, length = self.model.attn_mask, tokens.shape[1]
        if self.read_at is not None:
            # It adds the whole mask, however long the texts are.
            self.model.attn_mask = mask[:length, :length]
        try:
            output: Any = self.model(tokens)
        finally:
            self.model.attn_mask = mask
        # With `output_tokens`, as CoCa's configurations have it, the tokens come second.
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _highest(tokens: Tensor) -> Tensor:
    return tokens.argmax(-1)


def _first_of(token: int) -> ReadAt:
    return lambda tokens: (tokens == token).int().argmax(-1)


def _clip(path: Path, source: str, activation: str | None) -> TextTower:
    from transformers import CLIPTextModelWithProjection
    from transformers.initialization import no_init_weights

    half = read_text_half(path, activation=activation)
    config = text_config(half)
    with no_init_weights():
        make: Any = CLIPTextModelWithProjection._from_config
        model: Any = make(config, attn_implementation="sdpa").float()
    bare = {name: t for name, t in half.state.items() if name not in keys.OPENAI_METADATA}
    _fill(model, convert.openai_text_to_hf(bare, source), source)
    if half.vocabulary == _OPENAI_VOCABULARY:
        tokenize, files = _openai_tokenizer(half.context_length), {}
    else:
        tokenize = _own_tokenizer(path, source, half.vocabulary, half.context_length)
        files = _hash_tokenizer(path)
    settings = {
        "activation": half.activation,
        "heads": half.heads,
        "eos": half.eos_id,
        "eps": half.layer_norm_eps,
        "tokenizer": files or "openai",
    }
    # As transformers does: the highest token, also where the stated end is CLIP's old mistake.
    read_at = _highest if half.eos_id in (None, _OLD_EOS) else _first_of(half.eos_id)
    return _tower(_Pooled(model), tokenize, source, settings, half.context_length, read_at)


def _siglip(directory: Path, source: str) -> TextTower:
    from transformers import SiglipTextConfig, SiglipTextModel
    from transformers.initialization import no_init_weights

    stated = checkpoints.read_config(directory).get("text_config") or {}
    skipped = {"model_type", "transformers_version"}
    config: Any = SiglipTextConfig(**{k: v for k, v in stated.items() if k not in skipped})
    weights = checkpoints.read_directory_weights(
        directory,
        lambda name: name.startswith(_TEXT) and not name.endswith(keys.IGNORED_SUFFIX),
    )
    with no_init_weights():
        make: Any = SiglipTextModel._from_config
        model: Any = make(config, attn_implementation="sdpa").float()
    _fill(model, weights, source)
    length = int(config.max_position_embeddings)
    tokenize = _own_tokenizer(directory, source, int(config.vocab_size), length)
    settings = config.to_diff_dict() | {"tokenizer": _hash_tokenizer(directory)}
    return _tower(_Pooled(model), tokenize, source, settings, length)


_TEXT = "text_model."


def _open_clip(directory: Path, source: str) -> TextTower:
    import open_clip
    from open_clip.model import _build_text_tower

    path = directory / checkpoints.OPEN_CLIP_CONFIG
    content = read_json(path)
    model_cfg = content.get("model_cfg", content)
    text_cfg = model_cfg.get("text_cfg")
    if not isinstance(text_cfg, dict):
        raise TowerError(f"{path} holds no text_cfg.", _NO_TEXT)
    if text_cfg.get("hf_model_name"):
        raise TowerError(
            f"{path}: the text tower is {text_cfg['hf_model_name']} of transformers, which is not "
            "known here.",
            "Take a CLIP or SigLIP with a text tower of open_clip's own.",
        )
    try:
        module = _build_text_tower(
            model_cfg["embed_dim"], text_cfg, bool(model_cfg.get("quick_gelu"))
        )
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise TowerError(f"{path}: open_clip builds no text tower of it: {error}.") from error
    other = {"logit_scale", "logit_bias", *keys.OPENAI_METADATA}
    state = bare_text(read_open_clip_state(directory))
    _fill(module, {name: tensor for name, tensor in state.items() if name not in other}, source)
    try:
        tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{directory}")
    except (OSError, ValueError) as error:
        raise _no_tokenizer(source, " ".join(str(error).split())[:200].rstrip(".")) from error
    rows = int(text_cfg.get("vocab_size", _OPENAI_VOCABULARY))
    known = getattr(tokenizer, "vocab_size", None)
    _require_tokens(source, len(tokenizer.tokenizer) if known is None else int(known), rows)
    length = int(text_cfg.get("context_length", 77))
    settings = {"text_cfg": text_cfg, "quick_gelu": bool(model_cfg.get("quick_gelu"))}
    settings |= {"tokenizer": _hash_tokenizer(directory)}
    model = _First(module)
    return _tower(model, tokenizer, source, settings, length, model.read_at)


def _tower(
    module: nn.Module,
    tokenize: Tokenize,
    source: str,
    settings: Mapping[str, Any],
    context_length: int,
    read_at: ReadAt | None = None,
) -> TextTower:
    named: Iterable[tuple[str, Tensor]] = sorted(module.state_dict().items())
    label = json.dumps(settings, sort_keys=True, default=str)
    fingerprint = fingerprint_tensors([(label, torch.empty(0)), *named])
    return TextTower(
        module,
        tokenize,
        source=source,
        fingerprint=fingerprint,
        context_length=context_length,
        read_at=read_at,
    )


def _fill(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load weights strictly, with or without `text_model.` before their names."""
    wanted = {name.removeprefix(_TEXT): name for name in module.state_dict()}
    given = {name.removeprefix(_TEXT): tensor for name, tensor in state.items()}
    convert.refuse_keys(
        source, missing=wanted.keys() - given.keys(), unknown=given.keys() - wanted.keys()
    )
    try:
        module.load_state_dict({wanted[name]: tensor for name, tensor in given.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise TowerError(f"{source}: the text tower's sizes disagree: {reason}.") from error


def _openai_tokenizer(context_length: int) -> Tokenize:
    import open_clip

    return cast(Tokenize, open_clip.SimpleTokenizer(context_length=context_length))


def _own_tokenizer(path: Path, source: str, rows: int, context_length: int) -> Tokenize:
    from transformers import AutoTokenizer

    if not path.is_dir() or not tokenizer_files(path):
        raise _no_tokenizer(source, "no tokenizer file lies beside the weights")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _no_tokenizer(source, " ".join(str(error).split())[:200].rstrip(".")) from error
    _require_tokens(source, len(tokenizer), rows)

    def tokenize(texts: list[str]) -> Tensor:
        encoded = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=context_length,
            return_tensors="pt",
        )
        return cast(Tensor, encoded["input_ids"])

    return tokenize


def _hash_tokenizer(directory: Path) -> dict[str, str]:
    """Hash the files of a tokenizer: other tokens are other embeddings of the same texts."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tokenizer_files(directory)
    }


def _require_tokens(source: str, known: int, rows: int) -> None:
    # Without its files, transformers makes up a tokenizer of a few tokens and says nothing.
    if not _LEAST_VOCABULARY * rows <= known <= rows:
        raise _no_tokenizer(
            source, f"the one found knows {known} tokens, the text tower {rows} of them"
        )


def _no_tokenizer(source: str, reason: str) -> TowerError:
    return TowerError(
        f"the text tower of {source} has no tokenizer: {reason}.",
        "Copy its tokenizer files (tokenizer.json and the like) beside the weights.",
    )


def _names_tokens(names: Iterable[Any]) -> bool:
    return any(str(name).endswith("token_embedding.weight") for name in names)
