"""SentencePiece's model files (`spiece.model`, `tokenizer.model`), read and written.

A model is one message of protocol buffers, of which a handful of fields matter here. To know how such a message is
laid out takes less than to depend on the `sentencepiece` package for its description of it, and as little again to
write one: the numbers below are those of sentencepiece_model.proto.
"""

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

UNIGRAM, BPE = 1, 2  # kinds of a model
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of a piece
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field is written


@dataclasses.dataclass(frozen=True)
class Piece:
    """A word of the vocabulary, or part of one; its place is its id."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A vocabulary and how text is normalised; the defaults are the format's own."""

    pieces: tuple[Piece, ...]
    kind: int = UNIGRAM
    unk_id: int = 0
    byte_fallback: bool = False  # whether what is not in the vocabulary becomes its bytes
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False


# (message's number in the model, field's number in it, our field)
_FIELDS = (
    (2, 3, "kind"),
    (2, 24, "treat_whitespace_as_suffix"),
    (2, 35, "byte_fallback"),
    (2, 40, "unk_id"),
    (3, 2, "charsmap"),
    (3, 3, "add_dummy_prefix"),
    (3, 4, "remove_extra_whitespaces"),
    (3, 5, "escape_whitespaces"),
)
_PIECES = 1


def read(data: bytes) -> SentencePieceModel:
    """Returns the model in a file's content.

    Raises:
        ValueError: it is none, or a damaged one.
    """
    pieces, values = [], {}
    names = {(message, field): name for message, field, name in _FIELDS}
    types = {field.name: field.type for field in dataclasses.fields(SentencePieceModel)}
    for message, content in _fields(data):
        if message == _PIECES:
            pieces.append(_piece(_bytes(content)))
        elif message in (2, 3):
            for field, value in _fields(_bytes(content)):
                if name := names.get((message, field)):
                    values[name] = _bytes(value) if types[name] is bytes else types[name](value)
    if not pieces:
        raise ValueError("no model of SentencePiece's: it has no vocabulary")
    return SentencePieceModel(tuple(pieces), **values)


def write(model: SentencePieceModel) -> bytes:
    """Returns the content of a file that holds the model."""
    messages: dict[int, bytes] = {2: b"", 3: b""}
    for message, field, name in _FIELDS:
        messages[message] += _field(field, getattr(model, name))
    pieces = (_field(1, piece.text.encode()) + _field(2, piece.score) + _field(3, piece.kind) for piece in model.pieces)
    return b"".join(_field(_PIECES, piece) for piece in pieces) + _field(2, messages[2]) + _field(3, messages[3])


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = _bytes(value).decode()
        elif field == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif field == 3:
            kind = int(value)
    return Piece(text, score, kind)


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("no model of SentencePiece's: a number stands where a text should")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of a message's fields: numbers as such, everything else as its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == BYTES:
            size, at = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"no model of SentencePiece's: a field is of the type {wire}, which there is not")
        if at + size > len(data):
            raise ValueError("a model of SentencePiece's that ends too soon")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the number at a place, seven bits a byte and the lowest first, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            return value, at + 1
        at, shift = at + 1, shift + 7
    raise ValueError("a model of SentencePiece's that ends too soon, or none")


def _field(number: int, value: Any) -> bytes:
    """Returns a field as it is written, by the type of its value."""
    if isinstance(value, float):
        return _number(number << 3 | FIXED32) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _number(number << 3 | BYTES) + _number(len(value)) + value
    return _number(number << 3 | VARINT) + _number(int(value))


def _number(value: int) -> bytes:
    """Returns a number that is not negative, seven bits a byte and the lowest first."""
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
