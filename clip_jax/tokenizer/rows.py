"""What all tokenizers share: the strings that go in, and the rows of ids, all of one length, that come out."""

from collections.abc import Iterable, Sequence

import numpy as np

from clip_jax.typing import Int


def strings(texts: str | Iterable) -> list[str]:
    """Returns a list of strings; one string makes a list of one.

    Raises:
        TypeError: something is not a string; names its place.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] is not a string but {type(text).__name__}: {text!r}")
    return texts


def check_room(context_length: int, num_special: int) -> None:
    """Raises ValueError when not even the tokens that go around every text have room."""
    if context_length < num_special:
        raise ValueError(
            f"{context_length=} has no room for the start and end tokens: at least {num_special} (CLIP has 77)"
        )


def fill(
    ids_b: Sequence[Sequence[int]], texts: Sequence[str], context_length: int, pad_id: int = 0, pad_left: bool = False
) -> Int[np.ndarray, "b L"]:
    """Returns rows of `context_length` ids, filled up with `pad_id`.

    Raises:
        RuntimeError: a text has more ids; in OpenAI's words.
    """
    ids_bL = np.full((len(texts), context_length), pad_id, np.int32)
    for row, ids, text in zip(ids_bL, ids_b, texts, strict=True):
        if len(ids) > context_length:
            raise RuntimeError(f"Input {text} is too long for context length {context_length}")
        row[context_length - len(ids) if pad_left else 0 :][: len(ids)] = ids
    return ids_bL
