"""How SentencePiece normalises a text, and what Hugging Face's SiglipTokenizer does to one before.

`tokenizers` has SentencePiece's map of characters too ("Precompiled"), but goes by graphemes: where a letter that is
mapped carries a mark that is not, as in "º" and a joiner, it drops the mark. SiglipTokenizer runs SentencePiece itself,
so its ids come from here, where the longest entry of the map that fits is taken, place by place.
"""

import dataclasses
import functools
import itertools
import re
import string
import struct
from collections.abc import Callable

SPACE = "▁"  # stands for a space in the pieces of a vocabulary
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class CharsMap:
    """What is written for what: a trie of UTF-8 bytes, as darts-clone lays it out, and the texts its leaves point to.

    A unit of the trie has in bits 0 to 7 (and 31, if it is a leaf) its label, in bit 8 whether a leaf is below it, and
    in bits 10 to 30 how far away its children are, in steps of 256 where bit 9 is set. A leaf has a place in `texts`.
    """

    units: tuple[int, ...]
    texts: bytes  # each ends with a zero

    @classmethod
    def read(cls, data: bytes) -> "CharsMap":
        """Returns the map of SentencePiece's `precompiled_charsmap`; no bytes: one that changes nothing.

        Raises:
            ValueError: the bytes are no such map.
        """
        if not data:
            return cls((), b"")
        size = int.from_bytes(data[:4], "little")
        if size % 4 or not 0 < size <= len(data) - 4:
            raise ValueError(f"a map of characters of {len(data)} bytes says that {size} of them are its trie")
        return cls(struct.unpack(f"<{size // 4}I", data[4 : 4 + size]), data[4 + size :])

    def apply(self, text: str) -> str:
        """Returns the text with the longest entry at every place replaced, from left to right."""
        if not self.units or (self._keeps_ascii and text.isascii() and text.isprintable()):
            return text
        return self._applied(text.encode()).decode()

    @functools.cached_property
    def _keeps_ascii(self) -> bool:
        """Returns whether no text of printing ASCII is changed, so that looking is not worth while."""
        every_pair = bytes(itertools.chain(*itertools.product(range(0x20, 0x7F), repeat=2)))
        return self._applied(every_pair) == every_pair

    def _applied(self, data: bytes) -> bytes:
        units, texts, out, at = self.units, self.texts, bytearray(), 0
        while at < len(data):
            place, after, node = None, at + _length(data[at]), _distance(units[0])
            for i in range(at, len(data)):
                node ^= data[i]
                if node >= len(units) or units[node] & 0x800000FF != data[i]:
                    break
                has_leaf = units[node] >> 8 & 1
                node ^= _distance(units[node])
                if has_leaf:
                    place, after = units[node] & 0x7FFFFFFF, i + 1
            out += data[at:after] if place is None else texts[place : texts.index(b"\0", place)]
            at = after
        return bytes(out)


def _distance(unit: int) -> int:
    """Returns how far from a unit its children are."""
    return unit >> 10 << ((unit & 1 << 9) >> 6)


def _length(first: int) -> int:
    """Returns how many bytes a character has in UTF-8, by the first of them."""
    return 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def siglip_normaliser(charsmap: CharsMap, special: tuple[str, ...]) -> Callable[[str], str]:
    """Returns a function from a text to the one whose pieces are SiglipTokenizer's tokens.

    It finds the special tokens that are written out in the text, and they stay as they are. In what is between them
    letters become small, ASCII punctuation goes, and SentencePiece normalises. The space that SentencePiece puts
    first is there before anything is taken away, so that a second one follows where a text began with a space or with
    punctuation.
    """
    written_out = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def normalised(text: str) -> str:
        text = " ".join(text.lower().translate(_PUNCTUATION).split())
        text = re.sub(" {2,}", " ", charsmap.apply(text))
        return text.replace(" ", SPACE).rstrip(SPACE)

    def normalise(text: str) -> str:
        text, parts, at = SPACE + text.replace(SPACE, " "), [], 0
        for token in written_out.finditer(text):
            parts += [normalised(text[at : token.start()]), token.group()]
            at = token.end()
        return "".join([*parts, normalised(text[at:])])

    return normalise
