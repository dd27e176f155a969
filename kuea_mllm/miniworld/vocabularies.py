"""Small tokenizers in the real formats: CLIP's and Llama's byte-pair encodings.

Every word of the world is one token, so that sequences stay short; anything else falls back to
characters and bytes, so that any text survives the round trip.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from kuea_mllm.miniworld.captions import PREFIXES
from kuea_mllm.miniworld.prompts import example_texts, fixed_phrases
from kuea_mllm.miniworld.scenes import DIGITS, TEXTURES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, LlamaTokenizer

CLIP_CONTEXT = 32
LLAVA_CONTEXT = 512
IMAGE_TOKEN = "<image>"  # noqa: S105 - a token of the vocabulary, no secret
PAD_TOKEN = "<pad>"  # noqa: S105 - likewise
_WORD_END = "</w>"
_SPACE = "\u2581"  # what SentencePiece vocabularies write for a space
# Decimal numbers stay whole because a box coordinate should be one decision of the model.
_PIECE = re.compile(rf"{_SPACE}?\d\.\d\d|{_SPACE}?\w+|{_SPACE}?[^\w{_SPACE}]")


def build_clip_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer whose vocabulary holds the words of the captions."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    texts = [*PREFIXES, "on a background", "and", *DIGITS, *TEXTURES]
    texts += ["red", "green", "blue", "yellow", "purple", "white", "digit", "digits", "the"]
    merges = learn_merges(sorted(set(" ".join(texts).split())), suffix=_WORD_END)
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + _WORD_END for letter in letters)]
    pieces += ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    # Pairs are right; the annotation of transformers knows lines of a merges file only.
    return CLIPTokenizer(
        vocab=_numbered(pieces),
        merges=merges,  # type: ignore[arg-type]
        model_max_length=CLIP_CONTEXT,
        padding_side="right",
    )


def build_llava_tokenizer() -> LlamaTokenizer:
    """Build a Llama tokenizer with an image and a padding token.

    The fixed sentences and phrases of the prompts are one token each, built by ordinary merges.
    They would otherwise be most of every sequence, and of the training time.
    """
    from transformers import LlamaTokenizer

    words = [piece for text in example_texts() for piece in _pieces(text)]
    merges = learn_merges(sorted(set(words)))
    for phrase in fixed_phrases():
        merges += _chain(_PIECE.findall(phrase.replace(" ", _SPACE)))
    letters = [_SPACE, *(chr(code) for code in range(33, 127))]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pieces += ["".join(pair) for pair in merges]
    tokenizer = LlamaTokenizer(
        vocab=_numbered(pieces),
        merges=merges,
        model_max_length=LLAVA_CONTEXT,
        padding_side="right",
        add_bos_token=True,
        add_eos_token=False,
    )
    tokenizer.add_special_tokens(
        {"pad_token": PAD_TOKEN, "additional_special_tokens": [IMAGE_TOKEN]}
    )
    return tokenizer


def learn_merges(words: Sequence[str], suffix: str = "") -> list[tuple[str, str]]:
    """Find merges that join every word into one token, the most frequent pair first.

    Args:
        words: The words, letter by letter as the tokenizer spells them.
        suffix: What the last letter of a word carries, as in CLIP's vocabularies.

    Written out because the trainer of the tokenizers package breaks ties at random, and other
    token ids would be another model.
    """
    splits = [[*word[:-1], word[-1] + suffix] for word in words]
    merges = []
    while pairs := Counter(pair for split in splits for pair in pairwise(split)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        splits = [_join(split, best) for split in splits]
    return merges


def _join(split: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in split:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _pieces(text: str) -> list[str]:
    marked = text.replace(" ", _SPACE).replace("\n", "")
    # With and without the leading space: a line may begin with the word.
    return [*_PIECE.findall(marked), *_PIECE.findall(_SPACE + marked)]


def _chain(pieces: Sequence[str]) -> list[tuple[str, str]]:
    chain = []
    joined = pieces[0]
    for piece in pieces[1:]:
        chain.append((joined, piece))
        joined += piece
    return chain


def _numbered(pieces: Iterable[str]) -> dict[str, int]:
    unique = dict.fromkeys(pieces)
    return {piece: number for number, piece in enumerate(unique)}
