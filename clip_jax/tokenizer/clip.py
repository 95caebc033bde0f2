"""CLIP's own tokenizer: text to ids and back, with exactly the ids of OpenAI's, for any Unicode.

Being exact decides how this is built. Words are found by the `regex` package, as in OpenAI's code, since engines
differ in what they call a letter, in case folding (a long s after an apostrophe is an English ending) and in where a
special token may start. Within a word the byte pairs are merged in Rust, by `tokenizers`, which cannot differ: no two
merges of this table make the same symbol, and none comes before the merges that make its parts. Speed comes from
remembering words.

Everything is a module-level function, and the tables are built on first use, once a process: data workers may be
forked or spawned.
"""

import gzip
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from clip_jax.tokenizer.cleaning import cleaner
from clip_jax.tokenizer.rows import check_room, fill, strings

if TYPE_CHECKING:  # imported where they are used: `import clip_jax.tokenizer` costs nothing
    import regex
    from tokenizers.models import BPE

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49_408
SOT = 49_406  # <|startoftext|>
EOT = 49_407  # <|endoftext|>, the largest id: pooling finds it by argmax

_SPECIAL_TOKENS = {"<|startoftext|>": SOT, "<|endoftext|>": EOT}
_WORD_END = "</w>"
# A special token, an English ending, letters, one digit, or a run of the rest; in upper case or lower.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The byte-level alphabet, in the order of the first 256 ids: bytes that print stand for themselves, and come first.
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = _PRINTING + sorted(set(range(256)) - set(_PRINTING))
_SYMBOLS = [chr(byte) for byte in _PRINTING] + [chr(256 + i) for i in range(256 - len(_PRINTING))]
_BYTE_TO_SYMBOL = dict(zip(_BYTES, _SYMBOLS, strict=True))
_SYMBOL_TO_BYTE = {ord(symbol): byte for byte, symbol in _BYTE_TO_SYMBOL.items()}


def tokenize(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False, *, clean: str = "lower"
) -> np.ndarray:
    """Returns the ids, int32 [n, context_length]: SOT, the text, EOT, then zeros; one string makes one row.

    A text that is too long raises RuntimeError, in OpenAI's words, or loses its end (but keeps EOT) if `truncate`.
    A special token written out in a text becomes that token's id, as with OpenAI's. `clean` is one of
    `CLEANING`; "lower" is OpenAI's.
    """
    texts, clean_text = strings(texts), cleaner(clean)
    check_room(context_length, num_special=2)
    ids_b = [[SOT, *_encode(clean_text(text)), EOT] for text in texts]
    if truncate:
        ids_b = [ids if len(ids) <= context_length else [*ids[: context_length - 1], EOT] for ids in ids_b]
    return fill(ids_b, texts, context_length)


def decode(ids: Iterable[SupportsIndex]) -> str:
    """Returns the text of one row: lower case, a space after every word, special tokens written out, padding as "!".

    Bytes that are not UTF-8 (a character cut in two) become U+FFFD; an id outside the vocabulary raises ValueError.
    """
    ids, symbols = list(ids), vocabulary()
    unknown = [int(id) for id in ids if not 0 <= id < VOCAB_SIZE]
    if unknown:
        raise ValueError(f"ids run from 0 to {VOCAB_SIZE - 1}; not in the vocabulary: {unknown[:5]}")
    data = "".join(symbols[id] for id in ids).translate(_SYMBOL_TO_BYTE).encode("latin-1")
    return data.decode("utf-8", errors="replace").replace(_WORD_END, " ")


def _encode(text: str) -> list[int]:
    """Returns the ids of a cleaned text of any length, without SOT and EOT."""
    return [id for word in _word_pattern().findall(text) for id in _encode_word(word)]


@lru_cache(maxsize=1 << 16)  # captions share their words; bounded, since a crawl of the web has no end of them
def _encode_word(word: str) -> tuple[int, ...]:
    """Returns the ids of one match of the word pattern."""
    if word in _SPECIAL_TOKENS:
        return (_SPECIAL_TOKENS[word],)
    symbols = word.encode().decode("latin-1").translate(_BYTE_TO_SYMBOL)
    return tuple(token.id for token in _byte_pairs().tokenize(symbols))


@lru_cache(maxsize=1)
def _word_pattern() -> "regex.Pattern":
    """Returns what makes a word."""
    import regex

    return regex.compile(WORDS, regex.IGNORECASE)


@lru_cache(maxsize=1)
def _byte_pairs() -> "BPE":
    """Returns the merger of byte pairs."""
    from tokenizers.models import BPE

    ids = {symbol: id for id, symbol in enumerate(vocabulary())}
    return BPE(vocab=ids, merges=list(merges()), end_of_word_suffix=_WORD_END)


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Returns every symbol in the order of its id: bytes, bytes that end a word, merges, special tokens."""
    endings = [symbol + _WORD_END for symbol in _SYMBOLS]
    symbols = (*_SYMBOLS, *endings, *(left + right for left, right in merges()), *_SPECIAL_TOKENS)
    assert len(symbols) == VOCAB_SIZE, f"the merge table makes {len(symbols)} symbols instead of {VOCAB_SIZE}"
    return symbols


@lru_cache(maxsize=1)
def merges() -> tuple[tuple[str, str], ...]:
    """Returns the pairs to merge, best first, from the package's asset (tools/make_bpe_merges.py made it)."""
    asset = resources.files("clip_jax") / "assets" / "clip_bpe_merges.txt.gz"
    _, *lines = gzip.decompress(asset.read_bytes()).decode().splitlines()
    return tuple((left, right) for left, right in map(str.split, lines))
