"""clip_jax.tokenizer: known ids, its errors, and parity with OpenAI's own on whatever Unicode holds."""

import html
import inspect
import itertools
import multiprocessing
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from oracles import openai_clip, openai_tokenizer

from clip_jax.tokenizer import CONTEXT_LENGTH, EOT, SOT, VOCAB_SIZE, decode, tokenize
from clip_jax.tokenizer.clip import merges

GOLDEN = {  # also where no oracle is installed; the last three are where regular expression engines part ways
    "": [],
    "a diagram": [320, 22697],
    " A\tDOG\n": [320, 1929],
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "it's 2,024 cafés": [585, 568, 273, 267, 271, 273, 275, 3471, 20507],
    "日本語 😀": [39121, 44353, 34002, 508, 7334],
    "schÃ¶n &amp;amp;": [844, 7255, 333, 261],
    "\x1b[31mred": [736],
    "\u212a": [330],
    "a<|EndOfText|>b": [320, EOT, 321],
    "!<|endoftext|>": [0, 27, 347, 40786, 4160, 91, 285],
    "<|\u017ftartoftext|>": [27, 91, 129, 123, 2002, 6659, 18169, 91, 285],
    "'\u017f \u017f": [6, 129, 379, 129, 379],
}

# --- without an oracle ---


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(text):
    ids = [SOT, *GOLDEN[text], EOT]
    assert tokenize(text)[0].tolist() == ids + [0] * (CONTEXT_LENGTH - len(ids))


def test_rows_are_int32_one_a_text():
    both = tokenize(("a dog", "a photo of a cat."), context_length=9)
    assert both.dtype == np.int32
    assert both.shape == (2, 9)
    assert np.array_equal(both, np.concatenate([tokenize("a dog", 9), tokenize(["a photo of a cat."], 9)]))
    assert tokenize([]).shape == (0, CONTEXT_LENGTH)


def test_75_tokens_fit_and_the_76th_is_an_error_in_openais_words():
    fits, too_long = "dog " * 75, "dog " * 76
    assert tokenize(fits)[0].tolist() == [SOT] + [1929] * 75 + [EOT]
    with pytest.raises(RuntimeError) as error:
        tokenize(["a dog", too_long])
    assert str(error.value) == f"Input {too_long} is too long for context length 77"


def test_truncated_rows_keep_their_start_and_end_with_eot():
    assert tokenize(["dog " * 5, "dog"], context_length=4, truncate=True).tolist() == [
        [SOT, 1929, 1929, EOT],
        [SOT, 1929, EOT, 0],
    ]
    assert tokenize("dog", context_length=2, truncate=True).tolist() == [[SOT, EOT]]


@pytest.mark.parametrize("texts", [[b"a dog"], ["a dog", None], b"a dog", [["a dog"]]])
def test_what_is_not_a_string_is_a_type_error_that_names_its_place(texts):
    with pytest.raises(TypeError, match=r"texts\[[01]\] is not a string but (bytes|NoneType|int|list)"):
        inspect.unwrap(tokenize)(texts)  # beneath the type checks that only tests have


def test_a_context_without_room_for_the_special_tokens_is_an_error():
    with pytest.raises(ValueError, match="context_length=1 has no room"):
        tokenize("a dog", context_length=1)


def test_captions_survive_decoding_and_encoding_again():
    for text in captions(random.Random(0), 300):
        row = tokenize(text)[0]
        ids = row[1 : row.argmax()]
        decoded = decode(ids)
        assert tokenize(decoded)[0].tolist() == row.tolist()
        assert "".join(decoded.split()) == "".join(text.lower().split())


def test_decode_writes_special_tokens_and_padding_out():
    assert decode(tokenize("A dog", 6)[0]) == "<|startoftext|>a dog <|endoftext|>!!"


@pytest.mark.parametrize("id", [-1, VOCAB_SIZE])
def test_decoding_an_unknown_id_is_an_error_that_names_it(id):
    with pytest.raises(ValueError, match=rf"not in the vocabulary: \[{id}\]"):
        decode([SOT, id])


def test_the_order_in_which_pairs_are_merged_cannot_matter():
    rank = {left + right: i for i, (left, right) in enumerate(merges())}
    assert len(rank) == len(merges())
    assert all(rank.get(part, -1) < i for i, pair in enumerate(merges()) for part in pair)


def test_importing_loads_none_of_the_libraries_it_uses():
    code = "import sys, clip_jax.tokenizer; sys.exit(bool({'ftfy', 'regex', 'tokenizers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_spawned_workers_tokenize_like_this_process():
    texts = captions(random.Random(1), 20)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert np.array_equal(pool.submit(tokenize, texts).result(timeout=60), tokenize(texts))


# --- against OpenAI's ---

PLACES = "a the on in of with and over next to under"
THINGS = "dog cats Women's street sign 2019 iPhone T-shirt I'll won't they're we've vector London HD x-ray"
PIECES = (  # what each stage of the tokenizer reacts to
    "&amp; &lt; &gt; &amp;lt; &#39; &#x27; &nbsp; &copy &hellip; &NotAnEntity; &#0; &#xD800; &#x1c; &#133; &"
    " <b> </w> <|startoftext|> <|EndOfText|> <|endoftext <| |> ' 's 'S '\u017f 't 're 'RE 'Ve 'll 'LL 'm 'd \\n"
    " def f(x): x[i]+=1; // #include ^_^ https://a.b/c?d=e&f=g 3.14 ½ ² Ⅷ ① K İ ß ﬁ ŉ ǅ \u017f \u0131 \u2019s"
    " \x1b[31m \x1b[0m \x07 \ufeff \ufffd â€™ Ã© é e\u0301 ÃƒÂ© ï»¿ dog Dog 👩‍👩‍👧 🇫🇷 👍🏽"
)
SCRIPTS = {  # first and last code point
    "Latin": (0x00C0, 0x024F), "Greek": (0x0370, 0x03FF), "Cyrillic": (0x0400, 0x04FF), "Hebrew": (0x0590, 0x05FF),
    "Arabic": (0x0600, 0x06FF), "Devanagari": (0x0900, 0x097F), "Thai": (0x0E00, 0x0E7F), "Kana": (0x3040, 0x30FF),
    "CJK": (0x4E00, 0x9FFF), "Hangul": (0xAC00, 0xD7A3), "combining marks": (0x0300, 0x036F),
    "punctuation": (0x2000, 0x206F), "letter-like": (0x2100, 0x218F), "fullwidth": (0xFF00, 0xFFEF),
    "emoji": (0x1F300, 0x1FAFF), "mathematical": (0x1D400, 0x1D7FF), "C0 and ASCII": (0x00, 0x7F), "C1": (0x80, 0xBF),
    "surrogates": (0xD800, 0xDFFF), "tags": (0xE0000, 0xE01EF), "anything": (0x0000, 0x10FFFF),
}  # fmt: skip


def captions(rng: random.Random, n: int) -> list[str]:
    """Returns n captions of 3 to 14 words."""

    places, things = PLACES.split(), THINGS.split()

    def words() -> str:
        return " ".join(rng.choice(rng.choice((places, things))) for _ in range(rng.randint(3, 14)))

    return [words().capitalize() + rng.choice(("", ".", "!", " | 42", "... (stock)")) for _ in range(n)]


def scripts(rng: random.Random, n: int) -> list[str]:
    """Returns n strings of a few scripts each, with the joints that tokenizers trip over."""
    joints = [" ", "'", "'s", "\u200d", "\ufe0f", "\u2019", "1", "a", "\u0301", "\u00a0", "\u0085", "\u180e", "\x1c"]

    def text() -> str:
        ranges = rng.choices(list(SCRIPTS.values()), k=2)
        chars = (chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 25)))
        return "".join(char if rng.random() < 0.7 else char + rng.choice(joints) for char in chars)

    return [text() for _ in range(n)]


def pieces(rng: random.Random, n: int) -> list[str]:
    """Returns n strings glued from entities, escapes, special tokens, endings, code, emoji and half-mended text."""
    parts = PIECES.split(" ")
    glue = ["", "", " ", "  ", "\n", "\t", "\r\n", "\u3000"]
    return ["".join(rng.choice(parts) + rng.choice(glue) for _ in range(rng.randint(1, 9))) for _ in range(n)]


def mojibake(rng: random.Random, n: int) -> list[str]:
    """Returns n strings of UTF-8 read as something else, once or twice."""

    def misread(text: str) -> str:
        return text.encode("utf-8", "surrogatepass").decode(rng.choice(("latin-1", "cp1252", "cp1251")), "replace")

    return [misread(misread(text) if rng.random() < 0.3 else text) for text in scripts(rng, n)]


def ascii_pairs(_rng: random.Random, _n: int) -> list[str]:
    """Returns every pair of ASCII characters, where an entity could start: ftfy is passed by for most of these."""
    return [f"a {x}{y}lt;b" for x, y in itertools.product(map(chr, range(128)), repeat=2)]


def long_texts(rng: random.Random, _n: int) -> list[str]:
    """Returns texts of 10,000 characters: one word, many words, one character, no letters."""
    word = "".join(rng.choices("abcdefghij", k=10_000))
    texts = ["a" * 10_000, "é" * 10_000, "!?" * 5_000, "日" * 10_000, word[:2_000], " ".join(captions(rng, 300))]
    return [*texts, html.escape(texts[-1]), " " * 10_000 + "dog", "\n".join(scripts(rng, 500))]


FAMILIES: list[tuple[Callable, int]] = [
    (captions, 4000), (scripts, 6000), (pieces, 6000), (mojibake, 2000), (ascii_pairs, 128 * 128), (long_texts, 9),
]  # fmt: skip


def texts_of(family: Callable, n: int) -> list[str]:
    """Returns the family's texts without repetitions, the same ones in every run."""
    return sorted(set(family(random.Random(family.__name__), n)))


def assert_same_ids(texts: Iterable[str]) -> None:
    """Checks rows of just the right length, so that nothing is cut and a surplus id would be an error."""
    encode = openai_tokenizer().encode
    for text in texts:
        want = [SOT, *encode(text), EOT]
        assert tokenize(text, context_length=len(want))[0].tolist() == want, repr(text)


def test_there_are_more_than_20_000_distinct_strings():
    assert len({text for family in FAMILIES for text in texts_of(*family)}) > 20_000


@pytest.mark.parametrize(("family", "n"), FAMILIES, ids=lambda value: getattr(value, "__name__", ""))
def test_ids_equal_openais(family, n):
    assert_same_ids(texts_of(family, n))


def test_ids_equal_openais_for_every_code_point_of_planes_0_and_1_and_a_sample_of_the_rest():
    points = [*range(0x20000), *range(0x20000, 0x110000, 61), *range(0xE0000, 0xE0200)]
    chunks = (points[i : i + 64] for i in range(0, len(points), 64))
    contexts = "{c} a{c}b '{c} {c}{c}"
    assert_same_ids(" ".join(contexts.format(c=chr(point)) for point in chunk) for chunk in chunks)


@pytest.mark.parametrize("truncate", [False, True])
def test_rows_and_errors_equal_openais(truncate):
    clip = openai_clip()

    def outcome(function: Callable, text: str) -> list | str:
        try:
            return function(text, truncate=truncate).tolist()
        except RuntimeError as error:
            return str(error)

    texts = texts_of(pieces, 1000) + texts_of(scripts, 1000) + texts_of(long_texts, 9)
    outcomes = [outcome(tokenize, text) for text in texts]
    assert outcomes == [outcome(clip.tokenize, text) for text in texts]
    assert truncate or sum(isinstance(outcome, str) for outcome in outcomes) > 20


def test_decoding_equals_openais_for_any_ids():
    rng = random.Random(0)
    for _ in range(3000):
        ids = [rng.randrange(rng.choice((512, VOCAB_SIZE))) for _ in range(12)] + [SOT, EOT]
        assert decode(ids) == openai_tokenizer().decode(ids)
