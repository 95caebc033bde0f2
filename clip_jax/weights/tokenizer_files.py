"""The tokenizer of a folder in Hugging Face's style: what lies there becomes `Tokenize` and the content of one
tokenizer.json, and the other way round what must lie beside an export.

    tokenizer.json            words, and how they are found        tokenizer_config.json    the class, its flags
    spiece.model, …           the same, as SentencePiece has it    special_tokens_map.json  which token has which role
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError, about, nearest
from clip_jax.files import read_json
from clip_jax.tokenizer import clip
from clip_jax.tokenizer.file import FILE_NAME, usable
from clip_jax.weights import sentencepiece_model as spm
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.tokenizer_classes import BY_MODEL_TYPE, CLASSES, NOT_ASKED, TokenizerClass
from clip_jax.weights.tokenizer_parts import Parts, check_for_siglip, from_json, from_sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG, SPECIAL, MODEL_CONFIG = "tokenizer_config.json", "special_tokens_map.json", "config.json"


def read(folder: Path, clean: str, *, blank_sep: bool = False) -> tuple[Tokenize, str | None]:
    """Returns how a folder's tokenizer makes ids of texts, and the content of the tokenizer.json that does it.

    `clean` is what is done to a text before the folder's tokenizer sees it: "none" for Hugging Face's folders, what
    `tokenizer_kwargs` says for OpenCLIP's ("whitespace" if they do not). What the class itself does to it is in what
    is returned. `blank_sep` is OpenCLIP's `strip_sep_token`. A tokenizer with CLIP's own words is OpenAI's, whose ids
    the weights were trained with, and comes without a content.

    Raises:
        UserError: there is none, or one that is not known here, or cannot be used.
    """
    config = _object(folder / CONFIG)
    if "added_tokens_decoder" not in config:
        config |= _object(folder / SPECIAL)
    name = _class_name(folder, config)
    known = CLASSES[name]
    with about(folder), usable(f"its tokenizer, a {name},"):
        parts = dataclasses.replace(_parts(folder, known), config=config, defaults=known.defaults)
        if name == "CLIPTokenizer" and _is_clips(parts):
            return Tokenize("clip", "canonicalize" if clean == "canonicalize" else "lower"), None
        tokenizer = known.build(parts)
        return _rules(parts, known, tokenizer, clean, blank_sep), _written(tokenizer, parts, known)


def _object(path: Path) -> dict[str, Any]:
    """Returns what a file of JSON says; nothing, where there is none."""
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} should be an object of JSON")
    return content


def _class_name(folder: Path, config: dict[str, Any]) -> str:
    """Returns the name of the class that transformers would take."""
    name, model_type = config.get("tokenizer_class"), str(_object(folder / MODEL_CONFIG).get("model_type"))
    if model_type in NOT_ASKED or name is None:
        name = BY_MODEL_TYPE.get(model_type, "TokenizersBackend")
    name = str(name).removesuffix("Fast")
    if name not in CLASSES:
        raise UserError(
            f"{folder / CONFIG}: tokenizer_class={name!r} is not known here{nearest(name, CLASSES)}; where "
            f'{FILE_NAME} says all that it does, write "TokenizersBackend"'
        )
    refused = {"split_special_tokens": True, "truncation_side": "left"}
    if CLASSES[name].siglip:
        refused["do_lower_case"] = False
    if wrong := [f"{field}={value}" for field, value in refused.items() if config.get(field) == value]:
        raise UserError(f"{folder / CONFIG}: not known here: {', '.join(wrong)}")
    return name


def _parts(folder: Path, known: TokenizerClass) -> Parts:
    """Returns the words that a folder has for a class."""
    own = [folder / name for name in known.vocab_files]
    has_own = bool(own) and all(file.exists() for file in own)
    if (folder / FILE_NAME).exists() and not (known.siglip and has_own):
        return from_json(_object(folder / FILE_NAME))
    if not has_own:
        looked_for = [FILE_NAME, *([" with ".join(known.vocab_files)] if own else [])]
        raise UserError(f"there is no tokenizer; looked for {', or '.join(looked_for)}")
    if own[0].suffix == ".model":
        model = spm.read(own[0].read_bytes())
        if known.siglip:
            check_for_siglip(model)
        return from_sentencepiece(model)
    if own[0].suffix == ".txt":
        words = own[0].read_text(encoding="utf-8").split("\n")
        return Parts({word: id for id, word in enumerate(words) if word})
    lines = own[1].read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    return Parts(read_json(own[0]), merges)


def _is_clips(parts: Parts) -> bool:
    """Returns whether these are CLIP's own words: then ids are those of its tokenizer."""
    words = {word: id for id, word in enumerate(clip.vocabulary())}
    return (
        tuple(parts.merges) == clip.merges()
        and parts.vocab == words
        and words.keys() >= {token.content for token in parts.added()}
    )


def _rules(parts: Parts, known: TokenizerClass, tokenizer: "Tokenizer", clean: str, blank_sep: bool) -> Tokenize:
    """Returns what an architecture says of a tokenizer."""
    padding = (parts.content or {}).get("padding") or {}
    side = parts.config.get("padding_side", padding.get("direction", "left" if known.pad_left else "right"))
    ids = {role: tokenizer.token_to_id(token.content) for role in ("pad", "sep") if (token := parts.role(role))}
    pad_id = ids.get("pad", padding.get("pad_id"))
    if pad_id is None:
        raise UserError(f"{CONFIG} names no pad_token, with which a short text is filled up")
    if blank_sep and "sep" not in ids:
        raise UserError(f"{CONFIG} names no sep_token, which strip_sep_token is about")
    return Tokenize("file", clean, pad_id, side.lower() == "left", ids["sep"] if blank_sep else None, known.siglip)


def _written(tokenizer: "Tokenizer", parts: Parts, known: TokenizerClass) -> str:
    """Returns the tokenizer.json; numbers keep their digits, of which the library's reader may lose the last."""
    content = json.loads(tokenizer.to_str())
    if known.as_it_is:
        content = parts.content | {"added_tokens": content["added_tokens"]}
    return _json(content)


def files(bundle: Bundle, family: str) -> dict[str, bytes]:
    """Returns what must lie beside an export, content by file name, so that AutoTokenizer ("huggingface") or
    `open_clip.get_tokenizer("local-dir:…")` ("open_clip") make the same ids.

    What OpenCLIP has in its own config (`tokenizer_kwargs`) is not in the files. And Hugging Face cannot mend mojibake
    or resolve HTML entities; nor does it write zeros behind a text where the tokenizer is OpenAI's, but EOT again,
    where those models do not look.

    Raises:
        UserError: files cannot say what the tokenizer does.
    """
    rules, text = bundle.architecture.tokenize, bundle.tokenizer
    config = {"model_max_length": bundle.architecture.text.context_length, "clean_up_tokenization_spaces": False}
    if rules.kind == "clip":
        return {} if family == "open_clip" else _clip_files(rules.clean, config)
    if text is None:
        raise UserError(f"{bundle.origin} came without its tokenizer, {FILE_NAME}: the export would be without it, too")
    config |= {"padding_side": "left" if rules.pad_left else "right"}
    with usable(f"{bundle.origin}: its tokenizer"):
        return (_siglip_files if rules.siglip else _plain_files)(rules, json.loads(text), config, family)


# What `clean` does but for what Hugging Face cannot, as steps of a tokenizer.json's normalizer. Rust's lower case knows
# no final sigma, as Python's does, and its spaces are fewer by four.
_SPACES = [
    {"type": "Replace", "pattern": {"Regex": r"[\s\x1c-\x1f]+"}, "content": " "},
    {"type": "Strip", "strip_left": True, "strip_right": True},
]
_FINAL_SIGMA = r"\p{Cased}\p{Case_Ignorable}*\KΣ(?!\p{Case_Ignorable}*\p{Cased})"
_LOWER = [{"type": "Replace", "pattern": {"Regex": _FINAL_SIGMA}, "content": "ς"}, {"type": "Lowercase"}]
_PUNCTUATION = [
    {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
    {"type": "Replace", "pattern": {"Regex": r"[!-/:-@\[-`{-~]"}, "content": ""},
]
STEPS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "whitespace": _SPACES,
    "lower": [*_SPACES, *_LOWER],
    "canonicalize": [*_PUNCTUATION, *_LOWER, *_SPACES],
}


def _clip_files(clean: str, config: dict[str, Any]) -> dict[str, bytes]:
    """Returns CLIP's own tokenizer, as Hugging Face has it."""
    known = CLASSES["CLIPTokenizer"]
    ids = {word: id for id, word in enumerate(clip.vocabulary())}
    tokenizer = known.build(Parts(ids, list(clip.merges()), defaults=known.defaults))
    content = json.loads(tokenizer.to_str())
    if clean != "lower":  # which is what the class itself does, whatever the file says
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, *STEPS[clean]]}
    config |= {"tokenizer_class": "CLIPTokenizer" if clean == "lower" else "PreTrainedTokenizerFast"}
    config |= {f"{role}_token": token for role, token in known.defaults.items()}
    return {FILE_NAME: _json(content).encode(), CONFIG: _json(config, indent=2).encode()}


def _plain_files(rules: Tokenize, content: dict[str, Any], config: dict[str, Any], family: str) -> dict[str, bytes]:
    """Returns the tokenizer.json, and a config whose class takes it as it is."""
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": _token_of(rules.pad_id, "pad_id", content)}
    if rules.blank_id is not None:
        if family == "huggingface":
            raise UserError(f"Hugging Face cannot replace a token by 0, and tokenize.blank_id is {rules.blank_id}")
        config |= {"sep_token": _token_of(rules.blank_id, "blank_id", content)}
    steps = STEPS[rules.clean] if family == "huggingface" else []
    if steps:
        normalizer = content.get("normalizer")
        content["normalizer"] = {"type": "Sequence", "normalizers": [*steps, *([normalizer] if normalizer else [])]}
    return {FILE_NAME: _json(content).encode(), CONFIG: _json(config, indent=2).encode()}


def _siglip_files(rules: Tokenize, content: dict[str, Any], config: dict[str, Any], family: str) -> dict[str, bytes]:
    """Returns the model that SiglipTokenizer runs SentencePiece with, and the class's config."""
    if rules.clean == "canonicalize" and family == "huggingface":
        raise UserError("Hugging Face's SiglipTokenizer cannot make spaces of _, as tokenize.clean='canonicalize' does")
    parts = from_json(content)
    (eos,) = content["post_processor"]["special_tokens"]
    ids = {"pad": rules.pad_id, "unk": parts.unk_id}
    roles = {"eos_token": eos, **{f"{role}_token": parts.vocab[id][0] for role, id in ids.items()}}
    pieces = tuple(
        spm.Piece(word, score, _kind(word, score, is_unk=id == parts.unk_id, bytes_too=parts.byte_fallback))
        for id, (word, score) in enumerate(parts.vocab)
    )
    model = spm.SentencePieceModel(
        pieces, unk_id=parts.unk_id, byte_fallback=parts.byte_fallback, charsmap=parts.charsmap
    )
    config |= {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, **roles}
    return {CLASSES["SiglipTokenizer"].vocab_files[0]: spm.write(model), CONFIG: _json(config, indent=2).encode()}


def _kind(word: str, score: float, *, is_unk: bool, bytes_too: bool) -> int:
    """Returns what a piece is to SentencePiece; all that are no words have the score 0, which no word has."""
    if is_unk:
        return spm.UNKNOWN
    if score:
        return spm.NORMAL
    return spm.BYTE if bytes_too and re.fullmatch("<0x[0-9A-F]{2}>", word) else spm.CONTROL


def _token_of(id: int, name: str, content: dict[str, Any]) -> str:
    """Returns the special token of an id."""
    for token in content.get("added_tokens", []):
        if token["id"] == id:
            return token["content"]
    raise UserError(
        f"tokenize.{name}={id} is a word of the tokenizer, not a special token; transformers would not find it as a "
        "word once its config names it"
    )


def _json(content: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps(content, ensure_ascii=False, indent=indent)
