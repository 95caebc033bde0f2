"""What is done to a text before it is tokenized: the rules by their names, which are an architecture's words.

They are OpenCLIP's (`tokenizer_kwargs: {"clean": …}`), and "lower" is OpenAI's as well. But for "none" all begin
alike: mojibake is mended by ftfy, and HTML entities are resolved twice. ftfy is slow, and so is not asked about text
that it cannot change. What they all leave can be written as UTF-8.
"""

import html
import string
from collections.abc import Callable

from clip_jax.errors import UserError, nearest

_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def _encodable(text: str) -> str:
    """Returns the text with U+FFFD for what UTF-8 cannot write: a surrogate without the other half of its pair."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_plain(text: str) -> bool:
    """Returns whether neither ftfy nor html.unescape can change the text: printable ASCII without HTML entities."""
    return text.isascii() and text.isprintable() and ("&" not in text or "&" not in text.replace("& ", ""))


def _mended(text: str) -> str:
    """Returns the text with mojibake mended and HTML entities resolved."""
    if _is_plain(text):
        return text
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _whitespace(text: str) -> str:
    """Returns the mended text with one space between words."""
    return " ".join(_mended(text).split())


def _lower(text: str) -> str:
    """Returns the mended text with one space between words, in lower case."""
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    """Returns the mended text in lower case without ASCII punctuation, one space between words, and one for each _."""
    return " ".join(_mended(text).translate(_PUNCTUATION).lower().split())


CLEANING: dict[str, Callable[[str], str]] = {
    "none": _encodable,
    "whitespace": _whitespace,
    "lower": _lower,
    "canonicalize": _canonicalize,
}


def cleaner(rule: str) -> Callable[[str], str]:
    """Returns the function of a rule's name.

    Raises:
        UserError: there is no such rule.
    """
    if rule not in CLEANING:
        raise UserError(f"clean={rule!r} is no way to clean a text{nearest(rule, CLEANING)}")
    return CLEANING[rule]
