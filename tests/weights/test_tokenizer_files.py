"""A folder's tokenizer makes the ids that transformers and OpenCLIP make of it, and so does what is exported."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers as tiny
from oracles import open_clip, require, transformers

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError
from clip_jax.models.variants import VARIANTS
from clip_jax.tokenizer import EOT, clip, make
from clip_jax.tokenizer.cleaning import CLEANING
from clip_jax.weights import sentencepiece_model as spm
from clip_jax.weights import tokenizer_files
from clip_jax.weights.bundle import Bundle

# SiglipTokenizer says so of a text that ends with the token that ends a text.
pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has </s>")
LENGTH = 64
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "siglip": tiny.siglip,
    "siglip multilingual": lambda path: tiny.siglip(path, "mt5"),
    "t5": lambda path: tiny.t5(path, extra_ids=0, pad_token="</s>"),
    "mt5": lambda path: tiny.t5(path, "mt5"),
    "t5 file": tiny.t5_file,
    "gemma": tiny.gemma,
    "gemma on the left": lambda path: tiny.gemma(path, padding_side="left", add_bos_token=True),
    "xlm-roberta": tiny.xlm_roberta,
    "bert": tiny.bert,
    "bert cased": lambda path: tiny.bert(path, do_lower_case=False, strip_accents=True, tokenize_chinese_chars=False),
}
SIGLIPS = ("siglip", "t5 file", "gemma saved")  # as Hugging Face, OpenCLIP and SigLIP 2 have it
SAVED = ("t5", "mt5", "gemma", "xlm-roberta", "bert")  # once more as a tokenizer.json that transformers wrote


def theirs(folder: Path) -> Any:
    """Returns what AutoTokenizer makes of a folder."""
    transformers().logging.set_verbosity_error()
    return transformers().AutoTokenizer.from_pretrained(folder)


def their_ids(tokenizer: Any, texts: list[str]) -> np.ndarray:
    return np.asarray(tokenizer(texts, max_length=LENGTH, padding="max_length", truncation=True).input_ids)


def our_ids(folder: Path, texts: list[str], clean: str = "none", **options) -> np.ndarray:
    return make(*tokenizer_files.read(folder, clean, **options))(texts, LENGTH, True)


def folder_of(name: str, path: Path) -> Path:
    """Returns a folder by its name, or as transformers saves what it made of it ("… saved")."""
    folder = FOLDERS[name.removesuffix(" saved")](path / "made")
    if name.endswith("saved"):
        theirs(folder).save_pretrained(path / "saved")
        return path / "saved"
    return folder


# --- what is read ---


def test_there_are_more_than_20_000_distinct_strings():
    assert len(set(tiny.strings())) > 20_000


@pytest.mark.parametrize("name", [*FOLDERS, *(f"{name} saved" for name in SAVED)])
def test_ids_equal_those_of_transformers(name, tmp_path):
    folder = folder_of(name, tmp_path)
    texts = tiny.strings()[:: 1 if name in SIGLIPS else 10]
    differ = (our_ids(folder, texts) != their_ids(theirs(folder), texts)).any(1)
    assert not differ.sum(), [texts[i] for i in np.flatnonzero(differ)[:5]]


@pytest.mark.parametrize(
    "name", [*(name for name in FOLDERS if "siglip" not in name), *(f"{name} saved" for name in SAVED)]
)
def test_the_file_is_what_transformers_has_in_memory(name, tmp_path):
    """All of it but what nobody asks for: tokens around two texts at once, truncation and padding."""
    folder = folder_of(name, tmp_path)
    _, ours = tokenizer_files.read(folder, "none")
    contents = [json.loads(ours), json.loads(theirs(folder).backend_tokenizer.to_str())]
    for content in contents:
        for part in ("truncation", "padding"):
            content.pop(part)
        content["post_processor"].pop("pair", None)
    assert contents[0] == contents[1]


@pytest.mark.parametrize("make_folder", [tiny.t5_file, tiny.gemma])
@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
def test_ids_equal_those_of_openclips_wrapper(make_folder, clean, tmp_path):
    folder, texts = make_folder(tmp_path), tiny.strings()[::10]
    wrapper = open_clip().tokenizer.HFTokenizer(folder, context_length=LENGTH, clean=clean)
    assert np.array_equal(our_ids(folder, texts, clean), wrapper(texts).numpy())


def test_clipas_ids_equal_those_of_openclips_wrapper_which_blanks_the_last_token(tmp_path):
    folder, texts = tiny.bert(tmp_path), tiny.strings()[::10]
    wrapper = open_clip().tokenizer.HFTokenizer(folder, context_length=LENGTH, strip_sep_token=True)
    ours = our_ids(folder, texts, "whitespace", blank_sep=True)
    assert np.array_equal(ours, wrapper(texts).numpy())
    assert tiny.BERT_WORDS.index("[SEP]") not in ours


def test_siglip_2_is_lower_case_where_its_class_or_its_config_says_so(tmp_path):
    """GemmaTokenizer itself passes do_lower_case by, with which the weights were trained."""
    gemma = tiny.gemma(tmp_path / "made", do_lower_case=True)
    theirs(gemma).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Siglip2Tokenizer", "padding_side": "right"}
    siglip2 = tiny.write_folder(tmp_path / "saved", config)
    texts = tiny.strings()[::5]
    want = their_ids(theirs(siglip2), texts)
    assert np.array_equal(our_ids(siglip2, texts), want)
    assert np.array_equal(our_ids(gemma, texts), want)
    assert not np.array_equal(their_ids(theirs(gemma), texts), want)


def test_a_model_of_the_kind_siglip2_has_its_own_class_whatever_the_folder_says(tmp_path):
    theirs(tiny.gemma(tmp_path / "made")).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    assert '"Lowercase"' in tokenizer_files.read(tmp_path, "none")[1]


@pytest.mark.parametrize("model_type", ["siglip", "gemma"])
def test_a_folder_that_names_no_class_has_that_of_its_model(model_type, tmp_path):
    tiny.write_folder(
        tmp_path, {}, spiece__model=tiny.sentencepiece_model("t5"), config__json={"model_type": model_type}
    )
    if model_type == "siglip":
        assert tokenizer_files.read(tmp_path, "none")[0] == Tokenize("file", "none", 1, siglip=True)
    else:
        with pytest.raises(UserError, match=r"there is no tokenizer; looked for tokenizer\.json$"):
            tokenizer_files.read(tmp_path, "none")


def test_siglips_tokenizer_is_as_well_in_a_tokenizer_json(tmp_path):
    texts = tiny.strings()[::9]
    model = tiny.siglip(tmp_path / "model")
    rules, text = tokenizer_files.read(model, "none")
    config = json.loads((model / "tokenizer_config.json").read_text())
    alone = tiny.write_folder(tmp_path / "alone", config, tokenizer__json=text)
    assert tokenizer_files.read(alone, "none") == (rules, text)
    assert np.array_equal(our_ids(alone, texts), our_ids(model, texts))


def clip_tokenizer_json() -> dict[str, Any]:
    """Returns a tokenizer.json with CLIP's words, as openai/clip-vit-base-patch32 has it: merges in one string."""
    vocab = {word: id for id, word in enumerate(clip.vocabulary())}
    merges = [" ".join(merge) for merge in clip.merges()]
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": []}


@pytest.mark.parametrize(
    ("clean", "ours"), [("none", "lower"), ("whitespace", "lower"), ("canonicalize", "canonicalize")]
)
def test_clips_own_words_are_openais_tokenizer(clean, ours, tmp_path):
    config = {"tokenizer_class": "CLIPTokenizer"}
    folder = tiny.write_folder(tmp_path / "file", config, tokenizer__json=clip_tokenizer_json())
    assert tokenizer_files.read(folder, clean) == (Tokenize("clip", ours), None)
    content = clip_tokenizer_json()["model"]
    merges = "\n".join(["#version: 0.2", *content["merges"], ""])
    apart = tiny.write_folder(tmp_path / "apart", config, vocab__json=content["vocab"], merges__txt=merges)
    assert tokenizer_files.read(apart, clean) == (Tokenize("clip", ours), None)


def test_words_that_are_almost_clips_are_not(tmp_path):
    content = clip_tokenizer_json()
    words = content["model"]["vocab"]
    words["dog</w>"], words["cat</w>"] = words["cat</w>"], words["dog</w>"]
    folder = tiny.write_folder(tmp_path, {"tokenizer_class": "CLIPTokenizerFast"}, tokenizer__json=content)
    assert tokenizer_files.read(folder, "none")[0] == Tokenize("file", "none", EOT)
    texts = tiny.strings()[::20]
    assert np.array_equal(our_ids(folder, texts), their_ids(theirs(folder), texts))


# --- what cannot be read ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"tokenizer_class": "LlamaTokenizer"},
            r"tokenizer_class='LlamaTokenizer' is not known here.* write",
        ),
        ({"tokenizer_class": "T5TokeniserFast"}, "did you mean 'T5Tokenizer'"),
        ({"tokenizer_class": "T5Tokenizer", "truncation_side": "left"}, "not known here: truncation_side=left"),
        ({"tokenizer_class": "T5Tokenizer", "split_special_tokens": True}, "not known here: split_special_tokens=True"),
        ({"tokenizer_class": "SiglipTokenizer", "do_lower_case": False}, "not known here: do_lower_case=False"),
        ({"tokenizer_class": "T5Tokenizer", "pad_token": None}, "names no pad_token"),
        ({"tokenizer_class": "GemmaTokenizer"}, r"no tokenizer; looked for tokenizer\.json, or tokenizer\.model$"),
        ({"tokenizer_class": "CLIPTokenizer"}, r"looked for tokenizer\.json, or vocab\.json with merges\.txt$"),
        ({"tokenizer_class": "T5Tokenizer", "extra_ids": "x"}, "its tokenizer, a T5Tokenizer, cannot be used"),
        ({"tokenizer_class": "T5Tokenizer", "extra_ids": 10**12}, "extra_ids=1000000000000 should be 0 to 10000"),
        ({}, r"no tokenizer; looked for tokenizer\.json$"),
    ],
)
def test_what_a_config_asks_for_and_is_not_known_is_an_error_that_names_the_folder(config, message, tmp_path):
    tiny.write_folder(tmp_path, config, spiece__model=tiny.sentencepiece_model("t5"))
    with pytest.raises(UserError, match=message) as error:
        tokenizer_files.read(tmp_path, "none")
    assert str(error.value).startswith(str(tmp_path))


def test_a_separator_that_the_config_does_not_name_cannot_be_blanked(tmp_path):
    with pytest.raises(UserError, match="names no sep_token, which strip_sep_token is about"):
        tokenizer_files.read(tiny.t5(tmp_path), "none", blank_sep=True)


@pytest.mark.parametrize(
    "files",
    [
        {"spiece__model": b""},
        {"spiece__model": b"\x0a\xff"},
        {"spiece__model": b"<html>"},
        {"spiece__model": b"\x12\x05\x18"},
        {"tokenizer__json": "{"},
        {"tokenizer__json": "[]"},
        {"tokenizer__json": "{}"},
        {"tokenizer__json": '{"model": {"vocab": [["a", 0], 3]}}'},
        {"tokenizer__json": '{"model": {"vocab": []}}'},
        {"tokenizer__json": '{"model": {"vocab": [["a", 0.0]]}, "added_tokens": [{}]}'},
        {
            "tokenizer__json": {
                "model": {"vocab": []},
                "normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"},
            }
        },
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_folder(files, tmp_path):
    tiny.write_folder(tmp_path, {"tokenizer_class": "T5Tokenizer"}, **files)
    with pytest.raises(UserError, match=str(tmp_path)):
        tokenizer_files.read(tmp_path, "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_dummy_prefix": False}, "not known here: add_dummy_prefix=False"),
        (
            {"kind": spm.BPE, "remove_extra_whitespaces": False},
            "not known here: kind=2, remove_extra_whitespaces=False",
        ),
        (
            {"pieces": (spm.Piece("dog", -1.0, spm.UNUSED), spm.Piece("ab", 0.0, spm.USER_DEFINED))},
            "the piece 'dog', the piece 'ab'",
        ),
    ],
)
def test_siglips_model_with_what_is_not_computed_here_is_an_error(changes, message, tmp_path):
    model = dataclasses.replace(spm.read(tiny.sentencepiece_model("t5")), **changes)
    tiny.write_folder(tmp_path, {"tokenizer_class": "SiglipTokenizer"}, spiece__model=spm.write(model))
    with pytest.raises(UserError, match=message):
        tokenizer_files.read(tmp_path, "none")


# --- SentencePiece's files ---


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_model_is_read_as_sentencepiece_reads_it_and_written_back(name):
    data = tiny.sentencepiece_model(name)
    model = spm.read(data)
    proto = require("sentencepiece.sentencepiece_model_pb2", package="sentencepiece").ModelProto.FromString(data)
    assert [(piece.text, piece.score, piece.kind) for piece in model.pieces] == [
        (piece.piece, piece.score, piece.type) for piece in proto.pieces
    ]
    for message in (proto.trainer_spec, proto.normalizer_spec):
        for field in dataclasses.fields(model):
            if hasattr(
                message,
                their_name := {"kind": "model_type", "charsmap": "precompiled_charsmap"}.get(field.name, field.name),
            ):
                assert getattr(model, field.name) == getattr(message, their_name)
    assert spm.read(spm.write(model)) == model
    processor = require("sentencepiece").SentencePieceProcessor
    before, after = processor(model_proto=data), processor(model_proto=spm.write(model))
    assert before.encode(tiny.strings()[::50]) == after.encode(tiny.strings()[::50])


# --- what is exported ---


def bundle_of(rules: Tokenize, text: str | None) -> Bundle:
    named = VARIANTS["ViT-B-16-SigLIP"]
    changed = dataclasses.replace(named, tokenize=rules, text=dataclasses.replace(named.text, context_length=LENGTH))
    return Bundle(changed, {}, "a test", "here", text)


def export(path: Path, bundle: Bundle, family: str) -> Path:
    """Writes the files, and for OpenCLIP what its own config says of the tokenizer."""
    path.mkdir()
    for name, content in tokenizer_files.files(bundle, family).items():
        (path / name).write_bytes(content)
    if family == "open_clip":
        rules = bundle.architecture.tokenize
        options = {} if rules.clean == "none" else {"clean": rules.clean}
        options |= {} if rules.blank_id is None else {"strip_sep_token": True}
        text = {"context_length": LENGTH, "tokenizer_kwargs": options}
        text |= {} if rules.kind == "clip" else {"hf_tokenizer_name": "in this folder"}
        (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    return path


EXPORTED = [
    *((name, "canonicalize") for name in ("t5 file", "gemma")),
    *(
        (name, "whitespace")
        for name in ("siglip", "siglip multilingual", "t5", "gemma on the left", "bert", "xlm-roberta")
    ),
    *((name, "none") for name in ("siglip", "siglip multilingual", "t5", "gemma")),
]


@pytest.mark.parametrize(("name", "clean"), EXPORTED)
def test_autotokenizer_makes_the_same_ids_of_an_export(name, clean, tmp_path):
    """Where cleaning begins with ftfy, of texts that it and HTML entities do not concern: that is not in the files."""
    rules, text = tokenizer_files.read(FOLDERS[name](tmp_path / "from"), clean)
    folder = export(tmp_path / "to", bundle_of(rules, text), "huggingface")
    texts = [
        text
        for text in tiny.strings()[::10]
        if clean == "none" or CLEANING["whitespace"](text) == " ".join(text.split())
    ]
    if clean != "none":  # a special token that is written out is found before anything is cleaned
        texts = [text for text in texts if not any(literal in text for literal in tiny.LITERALS)]
    assert len(texts) > 700
    assert np.array_equal(their_ids(theirs(folder), texts), make(rules, text)(texts, LENGTH, True))


@pytest.mark.parametrize(("name", "clean"), [(name, clean) for name, clean in EXPORTED if clean != "none"])
def test_openclip_makes_the_same_ids_of_an_export(name, clean, tmp_path):
    rules, text = tokenizer_files.read(FOLDERS[name](tmp_path / "from"), clean, blank_sep=name == "bert")
    folder = export(tmp_path / "to", bundle_of(rules, text), "open_clip")
    texts = tiny.strings()[::20]
    found = open_clip().get_tokenizer(f"local-dir:{folder}")(texts).numpy()
    assert np.array_equal(found, make(rules, text)(texts, LENGTH, True))


@pytest.mark.parametrize("name", ["siglip", "siglip multilingual", "t5", "gemma"])
@pytest.mark.parametrize("family", ["open_clip", "huggingface"])
def test_an_export_is_read_as_what_it_was(name, family, tmp_path):
    before = tokenizer_files.read(FOLDERS[name](tmp_path / "from"), "none")
    assert tokenizer_files.read(export(tmp_path / "to", bundle_of(*before), family), "none") == before


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize", "none"])
def test_clips_own_tokenizer_is_exported_as_hugging_face_has_it(clean, tmp_path):
    """Of captions all ids are the same; behind EOT comes EOT again, which nobody sees."""
    rules = Tokenize("clip", clean)
    folder = export(tmp_path / "to", bundle_of(rules, None), "huggingface")
    texts = tiny.captions(tiny.random.Random(0), 2000)
    ours = make(rules, None)(texts, LENGTH, True)
    behind = np.arange(LENGTH) > ours.argmax(1)[:, None]
    assert np.array_equal(their_ids(theirs(folder), texts), np.where(behind, EOT, ours))
    again = tokenizer_files.read(folder, "none")
    assert (again == (rules, None)) is (clean == "lower")
    there = make(*again)(texts, LENGTH, True)
    assert np.array_equal(np.where(behind, 0, there), np.where(behind, 0, ours))


def test_clips_words_with_others_added_are_not_clips(tmp_path):
    folder = export(tmp_path / "to", bundle_of(Tokenize("clip"), None), "huggingface")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 49408, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    rules, text = tokenizer_files.read(folder, "none")
    assert rules.kind == "file"
    assert 49408 in make(rules, text)(["a <new> word"], LENGTH, True)


def test_openclip_has_clips_own_tokenizer_itself():
    assert tokenizer_files.files(bundle_of(Tokenize("clip"), None), "open_clip") == {}


def test_what_files_cannot_say_is_refused_with_the_reason(tmp_path):
    rules, text = tokenizer_files.read(tiny.bert(tmp_path / "bert"), "whitespace", blank_sep=True)
    with pytest.raises(UserError, match=r"cannot replace a token by 0, and tokenize\.blank_id is 3"):
        tokenizer_files.files(bundle_of(rules, text), "huggingface")
    siglip = tokenizer_files.read(tiny.siglip(tmp_path / "siglip"), "canonicalize")
    with pytest.raises(UserError, match="cannot make spaces of _"):
        tokenizer_files.files(bundle_of(*siglip), "huggingface")
    with pytest.raises(UserError, match=r"here came without its tokenizer, tokenizer\.json"):
        tokenizer_files.files(bundle_of(rules, None), "open_clip")
    with pytest.raises(UserError, match=r"tokenize\.pad_id=9 is a word of the tokenizer, not a special token"):
        tokenizer_files.files(bundle_of(Tokenize("file", "none", 9), text), "open_clip")
