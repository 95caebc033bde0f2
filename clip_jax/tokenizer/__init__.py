"""Text to ids: CLIP's own tokenizer, and those that are in a file beside the weights."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError
from clip_jax.tokenizer.clip import CONTEXT_LENGTH, EOT, SOT, VOCAB_SIZE, decode, tokenize
from clip_jax.tokenizer.file import FileTokenizer

__all__ = ["CONTEXT_LENGTH", "EOT", "SOT", "VOCAB_SIZE", "FileTokenizer", "Tokenizer", "decode", "make", "tokenize"]


# (texts, context_length, truncate) → ids, int32 [n, context_length]. Can be pickled, and forked with.
Tokenizer = Callable[[str | Sequence[str], int, bool], np.ndarray]


def make(rules: Tokenize, file: str | None) -> Tokenizer:
    """Returns the tokenizer of an architecture; `file` is what its tokenizer.json says, None where it has none.

    Raises:
        UserError: it should have one.
    """
    if rules.kind == "clip":
        return functools.partial(tokenize, clean=rules.clean)
    if file is None:
        raise UserError("this model's tokenizer is in a file, tokenizer.json, and that did not come with its weights")
    return FileTokenizer(file, rules)
