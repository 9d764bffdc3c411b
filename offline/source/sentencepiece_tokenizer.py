"""A fast tokenizer from a SentencePiece BPE model file, without running a repository's code.

InternLM2 checkpoints bring `tokenizer.model` and Python of their own to read it. The file is a
protocol buffer (sentencepiece_model.proto in https://github.com/google/sentencepiece); what is
needed of it is read here: pieces with scores and kinds, and whether a space is put in front.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError
from qig_serve.model_directory import is_pointer, pointer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_BPE = 2
SPACE = "\u2581"
_COPY_AGAIN = ": copy the published model's there again"


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says."""

    pieces: list[tuple[str, float, int]]
    """(text, score, kind); the position is the id."""
    dummy_prefix: bool
    """A space is put in front of every text."""


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: int, bytes, or 4 raw bytes of a float."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError("unknown wire type")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[at : at + size]
        at += size


def read_model(path: Path) -> SentencePieceModel:
    """Parse a tokenizer.model; UserError that names the file when it is none, or no BPE."""
    if is_pointer(path):
        raise pointer(path)
    pieces: list[tuple[str, float, int]] = []
    dummy_prefix, model_type = True, 1
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
            elif number == 2:
                model_type = dict(_fields(value)).get(3, 1)
            elif number == 3:
                dummy_prefix = bool(dict(_fields(value)).get(3, 1))
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, struct.error):
        raise UserError(f"{path} is not a SentencePiece model{_COPY_AGAIN}") from None
    if model_type != _BPE or not pieces:
        raise UserError(f"{path} is not a SentencePiece model of the BPE kind{_COPY_AGAIN}")
    return SentencePieceModel(pieces, dummy_prefix)


def merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The pairs that may be joined, in order: a piece's score ranks every way to make it."""
    ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in (NORMAL, USER_DEFINED)}
    found: list[tuple[float, int, int, str, str]] = []
    for text, score, kind in pieces:
        if kind != NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def build(path: Path) -> Any:
    """A `tokenizers.Tokenizer` that encodes and decodes as the SentencePiece model does.

    One difference: if the model has a dummy prefix, text that follows a user-defined piece
    gets one as well.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = read_model(path)
    unknown = next((text for text, _, kind in model.pieces if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            {text: i for i, (text, _, _) in enumerate(model.pieces)},
            merges(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(kind == BYTE for _, _, kind in model.pieces),
        )
    )
    steps: list[Any] = [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    special = [text for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    whole = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return tokenizer
