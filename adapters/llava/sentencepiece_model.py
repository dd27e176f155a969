"""Reads the pieces of a SentencePiece model file, with no other library.

Old LLaVA directories hold `tokenizer.model` alone, and transformers 5 cannot read that where the
installed protobuf is older than the one that sentencepiece was built with. The format is a protocol
buffer (https://protobuf.dev/programming-guides/encoding/) of which only these fields are needed
(google/sentencepiece, src/sentencepiece_model.proto): ModelProto.pieces = 1, .trainer_spec = 2,
.normalizer_spec = 3; SentencePiece.piece = 1, .score = 2, .type = 3; TrainerSpec.model_type = 3;
NormalizerSpec.add_dummy_prefix = 3, .remove_extra_whitespaces = 4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kuea_mllm.errors import UserError

_BPE = 2
_NORMAL, _BYTE = 1, 6
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary.

    Attributes:
        text: The piece, spaces written as "▁".
        score: Higher is merged earlier.
        kind: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    """

    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> list[Piece]:
    """Read the vocabulary of a Llama tokenizer, in the order of ids.

    Raises:
        UserError: If the file is damaged, or is no byte-pair model of Llama's kind.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = _numbers(fields, 2)
        normaliser = _numbers(fields, 3)
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise UserError(
            f"file {path} is no SentencePiece model ({error}).", "Run the download again."
        ) from error
    is_llama = trainer.get(3) == _BPE and any(piece.kind == _BYTE for piece in pieces)
    # A missing field means true for both of the normaliser's.
    if not is_llama or not normaliser.get(3, 1) or normaliser.get(4, 1):
        raise UserError(
            f"file {path} is no tokenizer of Llama's kind (byte pairs with byte fallback, a dummy "
            "prefix and kept spaces).",
            "Give a LLaVA whose language model is Llama or Vicuna.",
        )
    return pieces


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Return the merges of a byte-pair vocabulary, those to be done first in front.

    Ways to make the same piece are put in the order of transformers: shortest left part first.
    """
    known = {piece.text for piece in pieces}
    found: list[tuple[float, int, str, str]] = []
    for piece in pieces:
        if piece.kind != _NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in known and right in known:
                found.append((-piece.score, cut, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _piece(value: int | bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, content in _fields(_as_bytes(value)):
        if number == 1:
            text = _as_bytes(content).decode()
        elif number == 2:
            (score,) = struct.unpack("<f", _as_bytes(content))
        elif number == 3:
            kind = int(content) if isinstance(content, int) else kind
    return Piece(text, score, kind)


def _numbers(fields: list[tuple[int, int | bytes]], wanted: int) -> dict[int, int]:
    """Return the whole numbers of a nested message."""
    for number, content in fields:
        if number == wanted:
            return {key: v for key, v in _fields(_as_bytes(content)) if isinstance(v, int)}
    return {}


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(content):
        tag, position = _varint(content, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(content, position)
            yield number, value
            continue
        if wire == _BYTES:
            length, position = _varint(content, position)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + length > len(content):
            raise ValueError("it is cut short")
        yield number, content[position : position + length]
        position += length


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where bytes belong")
    return value
