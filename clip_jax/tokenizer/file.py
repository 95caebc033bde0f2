"""A tokenizer that is in a file beside the weights: a tokenizer.json, computed by the `tokenizers` library.

The file says how words are found and which tokens go around a text; what is done to the text first, what a short one
is filled up with and whether an id is blanked is the architecture's `Tokenize`.
"""

import base64
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError
from clip_jax.tokenizer.cleaning import cleaner
from clip_jax.tokenizer.rows import check_room, fill, strings
from clip_jax.tokenizer.sentencepiece import CharsMap, Siglip, Unigram

FILE_NAME = "tokenizer.json"


@contextlib.contextmanager
def usable(what: str) -> Iterator[None]:
    """Raises UserError for whatever the `tokenizers` library raises in the block: `what` is a file, and not our own.

    The library has no errors of its own, and where a file breaks its rules some way down it panics, as Rust calls it,
    with an exception that is none of Python's and has no name that could be imported.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} cannot be used: {str(error) or repr(error)}") from error


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """Texts to ids. It is its content: to pickle it is to copy the text, and every process builds it on first use."""

    file: str = dataclasses.field(repr=False)  # what the tokenizer.json says
    rules: Tokenize

    def __call__(self, texts: str | Sequence[str], context_length: int, truncate: bool = False) -> np.ndarray:
        """Returns the ids, int32 [n, context_length]: the text among the tokens that go around it, then `pad_id`, or
        first, where the rules pad on the left; one string makes one row.

        A text that is too long raises RuntimeError, in OpenAI's words, or loses its end (but no token that goes
        around it) if `truncate`.

        Raises:
            UserError: the file is no tokenizer's.
        """
        texts, clean, encoder = strings(texts), cleaner(self.rules.clean), self._encoder
        check_room(context_length, encoder.num_special)
        with usable(f"the {FILE_NAME}"):
            ids_b = encoder.encode([clean(text) for text in texts], context_length if truncate else None)
        ids_bL = fill(ids_b, texts, context_length, self.rules.pad_id, self.rules.pad_left)
        if self.rules.blank_id is not None:
            ids_bL[ids_bL == self.rules.blank_id] = 0
        return ids_bL

    @property
    def vocab_size(self) -> int:
        """Returns how many ids there are: one more than the largest.

        Raises:
            UserError: the file is no tokenizer's.
        """
        return self._encoder.vocab_size

    @property
    def _encoder(self) -> "_Encoder":
        with usable(f"the {FILE_NAME}"):
            return _siglip(self.file) if self.rules.siglip else _library(self.file)


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """What makes ids of texts: (texts, at most how many ids each or None) → ids."""

    encode: Callable[[list[str], int | None], list[list[int]]]
    num_special: int  # tokens that go around a text
    vocab_size: int


@functools.lru_cache(maxsize=4)
def _library(file: str) -> _Encoder:
    """Returns the `tokenizers` library's computation of a file."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(file)
    tokenizer.no_truncation()  # both are done here, so that no call changes what another one sees
    tokenizer.no_padding()
    num_special = tokenizer.num_special_tokens_to_add(is_pair=False)

    def encode(texts: list[str], at_most: int | None) -> list[list[int]]:
        if len(texts) == 1:  # threads of the library's own would be in the way of processes forked later
            encodings = [tokenizer.encode(texts[0], add_special_tokens=False)]
        else:
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        if at_most is not None:
            for encoding in encodings:
                encoding.truncate(at_most - num_special)
        return [tokenizer.post_process(encoding).ids for encoding in encodings]

    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    return _Encoder(encode, num_special, max(ids, default=-1) + 1)


@functools.lru_cache(maxsize=4)
def _siglip(file: str) -> _Encoder:
    """Returns what SiglipTokenizer computes with the words, the map of characters and the tokens of a file."""
    content = json.loads(file)
    model = content["model"]
    pieces = [(piece, score) for piece, score in model["vocab"]]
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    (eos,) = content["post_processor"]["special_tokens"].values()
    unigram = Unigram(pieces, model["unk_id"], byte_fallback=model["byte_fallback"])
    siglip = Siglip(unigram, CharsMap.read(charsmap_bytes(content)), special, pieces[model["unk_id"]][0])

    def encode(texts: list[str], at_most: int | None) -> list[list[int]]:
        end = None if at_most is None else at_most - len(eos["ids"])
        return [siglip.encode(text)[:end] + eos["ids"] for text in texts]

    return _Encoder(encode, len(eos["ids"]), max(len(pieces), *(id + 1 for id in special.values())))


def charsmap_bytes(content: dict) -> bytes:
    """Returns SentencePiece's map of characters as it stands in what a tokenizer.json says; no bytes: it has none.

    Raises:
        ValueError: it is not in base 64.
    """
    normalizer = content.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"] or "", validate=True)
    return b""
