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
from typing import TYPE_CHECKING

import numpy as np

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError
from clip_jax.tokenizer.cleaning import cleaner
from clip_jax.tokenizer.rows import check_room, fill, strings
from clip_jax.tokenizer.sentencepiece import CharsMap, siglip_normaliser

if TYPE_CHECKING:
    import tokenizers


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
        texts, clean, backend = strings(texts), cleaner(self.rules.clean), self._backend
        check_room(context_length, backend.num_special_tokens_to_add(is_pair=False))
        ids_b = self._encode([clean(text) for text in texts], context_length if truncate else None)
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
        with usable(f"the {FILE_NAME}"):
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

    with usable(f"the {FILE_NAME}"):
        tokenizer = Tokenizer.from_str(file)
    tokenizer.no_truncation()  # both are done here, so that no call changes what another one sees
    tokenizer.no_padding()
    if not siglip:
        return tokenizer, str
    tokenizer.normalizer = None
    special = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
    with usable(f"the map of characters in the {FILE_NAME}"):
        return tokenizer, siglip_normaliser(CharsMap.read(charsmap_bytes(json.loads(file))), special)


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
