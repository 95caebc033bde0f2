"""A tokenizer that is in a file beside the weights: a tokenizer.json, computed by the `tokenizers` library.

The file says how words are found and which tokens go around a text; what is done to the text first, what a short one
is filled up with and whether an id is blanked is the architecture's `Tokenize`.
"""

import base64
import binascii
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError
from clip_jax.tokenizer.cleaning import cleaner, encodable
from clip_jax.tokenizer.rows import check_room, fill, strings
from clip_jax.tokenizer.sentencepiece import CharsMap, siglip_normaliser

if TYPE_CHECKING:
    import tokenizers


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
        texts, clean, backend = strings(texts), cleaner(self.rules.clean), self._backend
        check_room(context_length, backend.num_special_tokens_to_add(is_pair=False))
        ids_b = self._encode([encodable(clean(text)) for text in texts], context_length if truncate else None)
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
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def _backend(self) -> "tokenizers.Tokenizer":
        return _built(self.file, self.rules.siglip)[0]

    def _encode(self, texts: list[str], at_most: int | None) -> list[list[int]]:
        """Returns the ids of cleaned texts, with the tokens that go around them."""
        backend, normalise = _built(self.file, self.rules.siglip)
        texts = [normalise(text) for text in texts]
        if len(texts) == 1:  # threads of the library's own would be in the way of processes forked later
            encodings = [backend.encode(texts[0], add_special_tokens=False)]
        else:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        if at_most is not None:
            for encoding in encodings:
                encoding.truncate(at_most - backend.num_special_tokens_to_add(is_pair=False))
        return [backend.post_process(encoding).ids for encoding in encodings]


@functools.lru_cache(maxsize=4)
def _built(file: str, siglip: bool) -> tuple["tokenizers.Tokenizer", Callable[[str], str]]:
    """Returns the library's tokenizer, and what is done to a text before it sees it."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(file)
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"a tokenizer.json that cannot be used: {error}") from error
    tokenizer.no_truncation()  # both are done here, so that no call changes what another one sees
    tokenizer.no_padding()
    if not siglip:
        return tokenizer, str
    tokenizer.normalizer = None
    special = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
    return tokenizer, siglip_normaliser(charsmap(file), special)


def charsmap(file: str) -> CharsMap:
    """Returns the map of characters in a tokenizer.json's normalizer; one that changes nothing where there is none.

    Raises:
        UserError: what is there is no such map.
    """
    try:
        return CharsMap.read(charsmap_bytes(json.loads(file)))
    except ValueError as error:
        raise UserError(f"a tokenizer.json whose map of characters cannot be used: {error}") from error


def charsmap_bytes(content: dict) -> bytes:
    """Returns SentencePiece's map of characters as it stands in what a tokenizer.json says; no bytes: it has none.

    Raises:
        ValueError: it is not in base 64.
    """
    normalizer = content.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "Precompiled":
            try:
                return base64.b64decode(step["precompiled_charsmap"] or "", validate=True)
            except binascii.Error as error:
                raise ValueError(f"not in base 64: {error}") from error
    return b""
