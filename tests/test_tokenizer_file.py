"""Tokenizers in files: what is done to a text first, which ids come of it, and what cannot be used."""

import json
import multiprocessing
import pickle
import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from oracles import open_clip
from test_tokenizer import captions
from tiny_tokenizers import BOS, EOS, PAD, UNK, WORDS, few_words, strings

from clip_jax import tokenizer
from clip_jax.architecture import TEXT_CLEANING, Tokenize
from clip_jax.errors import UserError
from clip_jax.tokenizer import EOT, SOT, FileTokenizer, make
from clip_jax.tokenizer.cleaning import CLEANING
from clip_jax.tokenizer.sentencepiece import CharsMap

RULES = Tokenize("file", clean="whitespace", pad_id=PAD)


@pytest.fixture(scope="module")
def file() -> str:
    return few_words()


def test_rows_are_int32_padded_with_the_rules_id(file):
    ids = FileTokenizer(file, RULES)(["a dog", "  zebra\n日 "], 6)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[BOS, 4, 5, EOS, PAD, PAD], [BOS, UNK, 8, EOS, PAD, PAD]]
    assert FileTokenizer(file, RULES)("a dog", 6).tolist() == ids[:1].tolist()
    assert FileTokenizer(file, RULES)([], 6).shape == (0, 6)
    assert FileTokenizer(file, RULES)("", 3).tolist() == [[BOS, EOS, PAD]]


def test_padding_on_the_left_ends_every_row_with_its_text(file):
    left = FileTokenizer(file, Tokenize("file", "none", PAD, pad_left=True))
    assert left(["a dog", "a"], 5).tolist() == [[PAD, BOS, 4, 5, EOS], [PAD, PAD, BOS, 4, EOS]]


def test_a_blank_id_becomes_0_also_where_it_pads(file):
    assert FileTokenizer(file, Tokenize("file", "none", EOS, blank_id=EOS))("dog", 5).tolist() == [[BOS, 5, 0, 0, 0]]


def test_truncated_rows_keep_the_tokens_around_the_text(file):
    made = FileTokenizer(file, RULES)
    assert made(["a dog and a cat", "a"], 4, True).tolist() == [[BOS, 4, 5, EOS], [BOS, 4, EOS, PAD]]
    assert made("a dog", 2, True).tolist() == [[BOS, EOS]]


def test_a_text_that_is_too_long_is_an_error_in_openais_words(file):
    with pytest.raises(RuntimeError, match=r"^Input a dog  and a cat is too long for context length 4$"):
        FileTokenizer(file, RULES)(["a", "a dog  and a cat"], 4)


def test_a_context_without_room_for_the_tokens_around_a_text_is_an_error(file):
    with pytest.raises(ValueError, match=r"context_length=1 has no room .* at least 2"):
        FileTokenizer(file, RULES)("a dog", 1)


def test_half_a_surrogate_pair_is_unknown_not_an_error(file):
    assert FileTokenizer(file, Tokenize("file", "none", PAD))("\ud800 dog", 4).tolist() == [[BOS, UNK, 5, EOS]]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', '{"model": {"type": "Unigram", "vocab": []}}']
)
def test_what_is_no_tokenizer_is_an_error(content):
    with pytest.raises(UserError, match=r"the tokenizer\.json cannot be used: "):
        FileTokenizer(content, RULES)("a dog", 4)


@pytest.mark.parametrize("charsmap", ["!", "AAAA", "/////wAA"])
def test_a_map_of_characters_that_is_none_is_an_error(charsmap, file):
    content = json.loads(file) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}}
    with pytest.raises(UserError, match=r"the .*tokenizer\.json cannot be used: "):
        FileTokenizer(json.dumps(content), Tokenize("file", "none", PAD, siglip=True))("a dog", 4)


def test_a_file_that_did_not_come_along_is_an_error():
    with pytest.raises(UserError, match=r"tokenizer\.json, and that did not come with its weights"):
        make(RULES, None)


def test_workers_tokenize_like_this_process(file):
    made = FileTokenizer(file, RULES)
    texts = ["a dog", "cat and dog"]
    assert pickle.loads(pickle.dumps(made)) == made
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert np.array_equal(pool.submit(made, texts, 6).result(timeout=60), made(texts, 6))


def test_the_size_of_the_vocabulary_counts_added_tokens(file):
    assert FileTokenizer(file, RULES).vocab_size == len(WORDS)


def test_a_rule_that_there_is_not_is_an_error_that_lists_them():
    with pytest.raises(UserError, match=r"clean='Lower' .* did you mean 'lower'"):
        tokenizer.tokenize("a dog", clean="Lower")


def test_clips_own_tokenizer_keeps_capitals_where_the_rule_does():
    lower, whitespace = (make(Tokenize("clip", clean), None) for clean in ("lower", "whitespace"))
    assert np.array_equal(lower("A  Dog", 7), tokenizer.tokenize("a dog", 7))
    assert not np.array_equal(whitespace("A  Dog", 7), lower("A  Dog", 7))
    assert whitespace(["a\ndog", "dog " * 9], 5, True).tolist() == [
        [SOT, 320, 1929, EOT, 0],
        [SOT, 1929, 1929, 1929, EOT],
    ]


def test_every_rule_is_a_word_of_an_architecture():
    assert tuple(CLEANING) == TEXT_CLEANING


@pytest.mark.parametrize("rule", CLEANING)
def test_what_is_left_by_every_rule_can_be_written_as_utf_8(rule):
    for text in ["\ud800", "a\udfff\ud800b", "&#xD800;", "&amp;#xDC00;", "\ud83d\ude00"]:
        CLEANING[rule](text).encode()


def test_a_map_of_characters_that_is_empty_changes_nothing():
    assert CharsMap.read(b"").apply("½ é") == "½ é"


# --- against OpenCLIP ---


@pytest.mark.parametrize("rule", ["whitespace", "lower", "canonicalize"])
def test_rules_equal_openclips(rule):
    theirs = open_clip().tokenizer.get_clean_fn(rule)
    texts = strings()[::7] + captions(random.Random(rule), 100)
    assert [CLEANING[rule](text) for text in texts] == [theirs(text) for text in texts]


@pytest.mark.parametrize("rule", ["whitespace", "lower", "canonicalize"])
def test_clips_own_tokenizer_equals_openclips_with_every_rule(rule):
    """OpenCLIP writes CLIP's special tokens otherwise (<start_of_text>): texts that have one in them are left out."""
    theirs = open_clip().tokenizer.SimpleTokenizer(clean=rule)
    texts = [text for text in strings()[::7] if "startoftext|" not in text and "endoftext|" not in text.lower()]
    ours = make(Tokenize("clip", rule), None)(texts, 77, True)
    assert np.array_equal(ours, theirs(texts).numpy())
    assert len(texts) > 2000
