"""Takes the tokenizer of an original LLaVA over, so that every text keeps its token ids.

transformers 5 reads a missing `legacy` as false, where the release LLaVA was made with meant true,
and its `save_pretrained` drops the key: a legacy tokenizer would silently turn into another one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.llava.prompt import IMAGE_TAG, SYSTEM, TURN_END
from kuea_mllm.adapters.llava.sentencepiece_model import merges_of, read_pieces
from kuea_mllm.errors import EnvironmentFailure, UserError
from kuea_mllm.io import read_json, write_json

LOGGER = logging.getLogger("kuea_mllm")

PAD_TOKEN = "<pad>"  # noqa: S105 - a token of text, no secret

_CONFIG_FILE = "tokenizer_config.json"
_MODEL_FILE = "tokenizer.model"
_FAST_FILE = "tokenizer.json"
_SPECIAL = {"bos_token": "<s>", "eos_token": TURN_END, "unk_token": "<unk>"}
# Spaces in all places, bytes, digits and turn ends, where the two modes differ.
_PROBES = (
    f"{SYSTEM} USER: ",
    "\nWhat is it? ASSISTANT:",
    f" A cat.{TURN_END}USER: And 2024?  Two  spaces ASSISTANT: \tNo.{TURN_END}",
    "naïve, 日本 🙂",
    " ",
    "",
)


@dataclass(frozen=True)
class TokenIds:
    """Ids of a tokenizer that was taken over.

    Attributes:
        known: Number of ids that the original tokenizer has.
        image: Id of the image placeholder.
        pad: Id of the padding token.
        bos: Id of the beginning of a text.
        eos: Id of the end of a turn.
    """

    known: int
    image: int
    pad: int
    bos: int
    eos: int


def write_tokenizer(source: Path, out: Path) -> TokenIds:
    """Write the tokenizer of an original LLaVA with `<image>` and `<pad>` added behind its ids.

    Args:
        source: Directory in the original layout.
        out: Existing directory to write to.

    Raises:
        UserError: If the tokenizer is incomplete or not of Llama's kind.
    """
    from transformers import AddedToken, AutoTokenizer, LlamaTokenizer

    settings = _read_settings(source / _CONFIG_FILE)
    vocabulary, merges = _read_vocabulary(source)
    names = {key: _text(settings.get(key)) or default for key, default in _SPECIAL.items()}
    for key, name in names.items():
        if name not in vocabulary:
            raise UserError(f"{source / _CONFIG_FILE}: {key} {name!r} is not in the vocabulary.")
    # What transformers 4 took a missing key for.
    is_legacy = settings.get("legacy") is not False
    if settings.get("legacy") is None:
        LOGGER.info(
            "%s does not say `legacy`; written as true, which it meant in 2023.",
            source / _CONFIG_FILE,
        )
    added = _added_tokens(source, settings, len(vocabulary))
    ends: dict[str, Any] = {
        "add_bos_token": settings.get("add_bos_token") is not False,
        "add_eos_token": settings.get("add_eos_token") is True,
    }
    made: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "legacy": is_legacy}
    own: Any = LlamaTokenizer(**made, **names, **ends)
    own.add_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    known = len(own)
    tokenizer: Any = LlamaTokenizer(**made, **names, **ends)
    every = [*added, *(token for token in (IMAGE_TAG, PAD_TOKEN) if token not in own.get_vocab())]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in every])
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.save_pretrained(out)
    if (source / _MODEL_FILE).is_file():
        shutil.copyfile(source / _MODEL_FILE, out / _MODEL_FILE)
    ids: dict[str, int] = tokenizer.get_vocab()
    special = [*names.values(), *every]
    _write_settings(
        out / _CONFIG_FILE,
        {**ends, **names},
        is_legacy=is_legacy,
        length=settings.get("model_max_length"),
        added={ids[token]: token for token in special},
    )
    written: Any = AutoTokenizer.from_pretrained(out, local_files_only=True)
    _require_equal(own, written, ids, every, out)
    return TokenIds(
        known, ids[IMAGE_TAG], ids[PAD_TOKEN], ids[names["bos_token"]], ids[names["eos_token"]]
    )


def _read_settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"file {path} does not hold a JSON object.")
    return content


def _read_vocabulary(source: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    # The original asks for the slow tokenizer, which reads this file.
    if (source / _MODEL_FILE).is_file():
        pieces = read_pieces(source / _MODEL_FILE)
        return {piece.text: index for index, piece in enumerate(pieces)}, merges_of(pieces)
    path = source / _FAST_FILE
    model = read_json(path).get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"file {path} is no tokenizer of Llama's kind (byte pairs with byte fallback).",
            "Give a LLaVA whose language model is Llama or Vicuna.",
        )
    merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    return dict(model["vocab"]), [(left, right) for left, right in merges]


def _added_tokens(source: Path, settings: Mapping[str, Any], first: int) -> list[str]:
    """Return the tokens behind the vocabulary, in the order of their ids."""
    found: dict[int, str] = {}
    for key, value in (settings.get("added_tokens_decoder") or {}).items():
        found[int(key)] = _text(value)
    for name in (source / "added_tokens.json", source / _FAST_FILE):
        if not name.is_file():
            continue
        content = read_json(name)
        if name.name == _FAST_FILE:
            found |= {entry["id"]: entry["content"] for entry in content.get("added_tokens", ())}
        else:
            found |= {number: text for text, number in content.items()}
    behind = sorted(number for number in found if number >= first)
    if behind != list(range(first, first + len(behind))):
        raise UserError(
            f"{source}: the added tokens have the ids {behind}, which leave gaps behind the "
            f"vocabulary of {first}.",
            "Restore the tokenizer files from the source of the model.",
        )
    return [found[number] for number in behind]


def _text(value: Any) -> str:
    """Return a token that is written as a string or as an object with its content."""
    return str(value.get("content", "")) if isinstance(value, Mapping) else str(value or "")


def _write_settings(
    path: Path,
    stated: Mapping[str, Any],
    *,
    is_legacy: bool,
    length: Any,
    added: Mapping[int, str],
) -> None:
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(
        path,
        {
            "tokenizer_class": "LlamaTokenizer",
            "processor_class": "LlavaProcessor",
            "legacy": is_legacy,
            "clean_up_tokenization_spaces": False,
            **stated,
            "pad_token": PAD_TOKEN,
            "image_token": IMAGE_TAG,
            "extra_special_tokens": {"image_token": IMAGE_TAG},
            "model_max_length": length if isinstance(length, int) else 2048,
            # For answering in batches; a training collator pads by itself.
            "padding_side": "left",
            # Read by transformers 4 beside tokenizer.model.
            "added_tokens_decoder": {
                str(number): {"content": text, **token, "special": True}
                for number, text in sorted(added.items())
            },
        },
    )


def _require_equal(
    own: Any, written: Any, ids: Mapping[str, int], added: list[str], out: Path
) -> None:
    """Read the files back as a user would."""
    for text in _PROBES:
        expected, found = own(text)["input_ids"], written(text)["input_ids"]
        if expected != found:
            raise EnvironmentFailure(
                f"the tokenizer written to {out} splits {text[:40]!r} into {found}, the original "
                f"into {expected}.",
                "Please report this with the versions of transformers and tokenizers.",
            )
    for token in added:
        if written(token, add_special_tokens=False)["input_ids"] != [ids[token]]:
            raise EnvironmentFailure(f"the tokenizer written to {out} splits {token!r}.")
