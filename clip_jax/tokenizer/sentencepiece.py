"""SentencePiece as Hugging Face's SiglipTokenizer runs it, id by id: the map of characters, then the Unigram model.

The `tokenizers` library has both, and nearly computes the same. Its map goes by graphemes: where a letter that is
mapped carries a mark that is not, as in "º" and a joiner, it drops the mark. And its sums have 53 bits where
SentencePiece keeps 24: which of two ways to cut "zzz" is better, "zz z" or "z zz", is a matter of the last of these.
Speed comes from remembering words.
"""

import dataclasses
import functools
import itertools
import math
import re
import string
import struct
from collections.abc import Mapping, Sequence
from ctypes import c_float

SPACE = "▁"  # stands for a space in the pieces of a vocabulary
UNKNOWN_PENALTY = 10.0  # how much worse than the worst piece a character is that has none
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# How many bytes a character has in UTF-8, by the first of them.
_LENGTHS = [1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4 for first in range(256)]


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
    def _children(self) -> tuple[int, ...]:
        """Returns how far away the children of each unit are."""
        return tuple(unit >> 10 << ((unit & 1 << 9) >> 6) for unit in self.units)

    @functools.cached_property
    def _keeps_ascii(self) -> bool:
        """Returns whether no text of printing ASCII is changed, so that looking is not worth while."""
        every_pair = bytes(itertools.chain(*itertools.product(range(0x20, 0x7F), repeat=2)))
        return self._applied(every_pair) == every_pair

    def _applied(self, data: bytes) -> bytes:
        units, children, texts, out, at = self.units, self._children, self.texts, bytearray(), 0
        while at < len(data):
            place, after, node = None, at + _LENGTHS[data[at]], children[0]
            for i in range(at, len(data)):
                node ^= data[i]
                if node >= len(units) or units[node] & 0x800000FF != data[i]:
                    break
                has_leaf = units[node] >> 8 & 1
                node ^= children[node]
                if has_leaf:
                    place, after = units[node] & 0x7FFFFFFF, i + 1
            out += data[at:after] if place is None else texts[place : texts.index(b"\0", place)]
            at = after
        return bytes(out)


@dataclasses.dataclass(frozen=True)
class Cut:
    """The best way to cut a word: the ids, the score of each piece, and how much worse the next best way is."""

    ids: tuple[int, ...]
    scores: tuple[float, ...]
    margin: float


class Unigram:
    """The language model whose pieces a text is cut into: those whose scores, logarithms of odds, have the best sum.

    Sums are of float32, as SentencePiece's, and of two that are equal the first one found stays. So how a word is cut
    depends on the sum so far, but only where two ways are almost as good: such words are cut again, others remembered.
    """

    def __init__(self, pieces: Sequence[tuple[str, float]], unk_id: int, *, byte_fallback: bool):
        # What is no word, such as a byte or the unknown token's name, has the score 0, and is found in no text.
        self.pieces = {piece: (id, score) for id, (piece, score) in enumerate(pieces) if score}
        self.longest = max(map(len, self.pieces))
        self.unk_id = unk_id
        self.unk_score = c_float(min(score for _, score in self.pieces.values()) - UNKNOWN_PENALTY).value
        ids = {piece: id for id, (piece, _) in enumerate(pieces)}
        self.bytes = [ids[f"<0x{byte:02X}>"] for byte in range(256)] if byte_fallback else None
        # Where no piece goes on behind a word, a text is cut best by cutting its words best.
        goes_on = any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece in self.pieces)
        self.words = re.compile("(?s).+" if goes_on else f"{SPACE}*[^{SPACE}]+|{SPACE}+")
        self.remembered = functools.lru_cache(maxsize=1 << 16)(self.cut)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a normalised text; unknown characters that follow each other are one."""
        ids, total = [], 0.0
        for word in self.words.findall(text):
            cut = self.remembered(word)
            # What a word can add is rounded once a piece: this is more than all of it, here and in what is remembered.
            if cut.margin <= (len(word) + 1) * 2**-22 * (abs(total) + sum(map(abs, cut.scores))):
                cut = self.cut(word, total)
            ids += cut.ids
            for score in cut.scores:
                total = c_float(total + score).value
        return [id for i, id in enumerate(ids) if id != self.unk_id or i == 0 or ids[i - 1] != id]

    def cut(self, word: str, total: float = 0.0) -> Cut:
        """Returns the best way to cut a word that follows pieces with that sum."""
        best = [total, *[-math.inf] * len(word)]  # the sum up to each place
        came = [(0, 0, 0.0)] * (len(word) + 1)  # from where the best way comes there, by which piece
        margin = [math.inf] * (len(word) + 1)
        for start in range(len(word)):
            ways = []
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                if known := self.pieces.get(word[start:end]):
                    ways.append((end, *known))
            if not ways or ways[0][0] > start + 1:
                ways.append((start + 1, self.unk_id, self.unk_score))
            for end, id, score in ways:
                sum_there = c_float(best[start] + score).value
                if sum_there > best[end]:
                    margin[end] = sum_there - best[end]
                    best[end], came[end] = sum_there, (start, id, score)
                else:
                    margin[end] = min(margin[end], best[end] - sum_there)
        return self._traced(word, came, margin)

    def _traced(self, word: str, came: list[tuple[int, int, float]], margin: list[float]) -> Cut:
        """Returns the way that leads to a word's end."""
        ids, scores, least, end = [], [], math.inf, len(word)
        while end:
            least = min(least, margin[end])
            start, id, score = came[end]
            is_bytes = id == self.unk_id and self.bytes is not None
            ids += [self.bytes[byte] for byte in reversed(word[start:end].encode())] if is_bytes else [id]
            scores.append(score)
            end = start
        return Cut(tuple(reversed(ids)), tuple(reversed(scores)), least)


class Siglip:
    """SiglipTokenizer, but for the token that it puts behind a text.

    It has SentencePiece cut a text with the name of the unknown token before it, and takes that away again: so what
    follows has pieces and a sum before it, on which the last bit may depend.
    """

    def __init__(self, model: Unigram, charsmap: CharsMap, special: Mapping[str, int], unk: str):
        """`special` are the tokens that are found in a text before anything is done to it, with their ids."""
        self.model, self.charsmap, self.special = model, charsmap, dict(special)
        self.written_out = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.before = SPACE + unk
        self.num_before = len(model.encode(self.before))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; a space is put before it, not before what follows a special token."""
        text, ids, at = SPACE + text.replace(SPACE, " "), [], 0
        for token in self.written_out.finditer(text):
            ids += [*self._encode(text[at : token.start()]), self.special[token.group()]]
            at = token.end()
        return ids + self._encode(text[at:])

    def _encode(self, text: str) -> list[int]:
        """Returns the ids of a text without special tokens: small letters, no punctuation, normalised, cut."""
        text = " ".join(text.lower().translate(_PUNCTUATION).split())
        text = re.sub(" {2,}", " ", self.charsmap.apply(text))
        return self.model.encode(self.before + text.replace(" ", SPACE).rstrip(SPACE))[self.num_before :]
