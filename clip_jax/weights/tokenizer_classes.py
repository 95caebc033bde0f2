"""What `transformers` makes of a tokenizer's files, class by class, as the `tokenizers` library computes it.

Since its fifth version a class takes the vocabulary out of a folder and builds everything else itself: how a text is
normalised, how it is split, which tokens go around it. The tokenizer.json that lies there may say something else, and
nobody computes that. So the class that a folder names decides, as of transformers 5.23, and each has an entry here;
only those without a word of their own, such as PreTrainedTokenizerFast, take the file as it is.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from clip_jax.errors import UserError
from clip_jax.tokenizer.clip import WORDS
from clip_jax.tokenizer.sentencepiece import SPACE
from clip_jax.weights.tokenizer_parts import ROLES, Parts

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

EXTRA_IDS, LARGEST_EXTRA_IDS = 100, 10_000  # that T5 has unless its config says otherwise; that anybody could want


def _tokens(parts: Parts, generated: Iterable[str] = ()) -> list["AddedToken"]:
    """Returns all tokens that a class adds to its vocabulary, or has found apart from other words."""
    tokens = {token.content: token for token in parts.added()}
    for token in (*map(parts.role, ROLES), *parts.extra(generated)):
        if token is not None:
            tokens.setdefault(token.content, token)
    return list(tokens.values())


def _around(tokenizer: "Tokenizer", first: "AddedToken | None", last: "AddedToken | None") -> None:
    """Puts a token before every text, and one behind it."""
    from tokenizers import processors

    first, last = (token and token.content for token in (first, last))
    template = [*([first] if first else []), "$A", *([last] if last else [])]
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((first, last)) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def _unigram(parts: Parts, unk_id: int) -> "Tokenizer":
    """Returns T5's and XLM-RoBERTa's: words apart, and a space before each."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram(parts.vocab, unk_id=unk_id, byte_fallback=False))
    if parts.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(parts.charsmap)
    scheme = "always" if parts.config.get("add_prefix_space", True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    return tokenizer


def _t5(parts: Parts) -> "Tokenizer":
    extra_ids = parts.config.get("extra_ids", EXTRA_IDS)
    if extra_ids > LARGEST_EXTRA_IDS:
        raise UserError(f"{extra_ids=} should be 0 to {LARGEST_EXTRA_IDS}")
    if parts.content is None:  # the model does not have them
        vocab = [*parts.vocab, *((f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids)))]
        parts = dataclasses.replace(parts, vocab=vocab)
    tokenizer = _unigram(parts, unk_id=2)
    tokenizer.add_tokens(_tokens(parts, (f"<extra_id_{i}>" for i in range(extra_ids))))
    _around(tokenizer, None, parts.role("eos"))
    return tokenizer


def _xlm_roberta(parts: Parts) -> "Tokenizer":
    if parts.content is None:  # the model's vocabulary begins otherwise, and has no mask
        first = [(parts.role(role).content, 0.0) for role in ("bos", "pad", "eos", "unk")]
        vocab = [*first, *parts.vocab[3:], (parts.role("mask").content, 0.0)]
        parts = dataclasses.replace(parts, vocab=vocab)
    tokenizer = _unigram(parts, unk_id=3)
    tokenizer.add_tokens(_tokens(parts))
    _around(tokenizer, parts.role("bos"), parts.role("eos"))
    return tokenizer


def _siglip(parts: Parts) -> "Tokenizer":
    """Returns what SentencePiece computes once it has normalised: the map of characters is kept, to do that with."""
    from tokenizers import Tokenizer, models, normalizers

    model = models.Unigram(parts.vocab, unk_id=parts.unk_id, byte_fallback=parts.byte_fallback)
    tokenizer = Tokenizer(model)
    if parts.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(parts.charsmap)
    tokens = _tokens(dataclasses.replace(parts, control=[]))
    tokenizer.add_special_tokens([token.content for token in tokens])  # with spaces around or not is all the same
    _around(tokenizer, None, parts.role("eos"))
    return tokenizer


def _gemma(parts: Parts) -> "Tokenizer":
    """Returns Gemma's. The lower case of SigLIP 2 is done where the config asks for it, as Siglip2Tokenizer does;
    transformers' GemmaTokenizer passes that word by, and gives other ids than the weights were trained with."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.BPE(
        vocab=parts.vocab,
        merges=parts.merges,
        unk_token=parts.role("unk").content,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    if parts.config.get("do_lower_case"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(_tokens(parts))
    if parts.content is None:
        first, last = (parts.role(role) if parts.config.get(f"add_{role}_token") else None for role in ("bos", "eos"))
        _around(tokenizer, first, last)
    elif parts.content.get("post_processor"):
        tokenizer.post_processor = _post_processor(parts.content["post_processor"])
    return tokenizer


def _siglip2(parts: Parts) -> "Tokenizer":
    return _gemma(dataclasses.replace(parts, config=parts.config | {"do_lower_case": True}))


def _post_processor(content: dict[str, Any]):
    """Returns the library's object for what a tokenizer.json says about the tokens around a text."""
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    return Tokenizer.from_str(json.dumps({"model": model, "post_processor": content})).post_processor


def _bert(parts: Parts) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(parts.vocab, unk_token=parts.role("unk").content))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=parts.config.get("tokenize_chinese_chars", True),
        strip_accents=parts.config.get("strip_accents"),
        lowercase=parts.config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_tokens(_tokens(parts))
    _around(tokenizer, parts.role("cls"), parts.role("sep"))
    return tokenizer


def _clip(parts: Parts) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    model = models.BPE(
        vocab=parts.vocab,
        merges=parts.merges,
        unk_token=parts.role("unk").content,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_tokens(parts))
    last, first = (
        (token, tokenizer.token_to_id(token)) for token in (parts.role("eos").content, parts.role("bos").content)
    )
    tokenizer.post_processor = processors.RobertaProcessing(last, first, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def _as_it_is(parts: Parts) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(parts.content))
    tokenizer.add_tokens(_tokens(parts))
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """A class of transformers'."""

    build: Callable[[Parts], "Tokenizer"]
    defaults: dict[str, str]  # the tokens by their roles, where a config does not say
    pad_left: bool = False  # the same
    vocab_files: tuple[str, ...] = ()  # that it takes where there is no tokenizer.json
    siglip: bool = False  # whether text is normalised as SiglipTokenizer does
    as_it_is: bool = False  # whether a tokenizer.json is taken as it is


_GEMMA = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
_T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_XLM_ROBERTA = _T5 | {"bos": "<s>", "sep": "</s>", "cls": "<s>", "mask": "<mask>"}
_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_CLIP = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"}
CLASSES = {
    "SiglipTokenizer": TokenizerClass(_siglip, _T5 | {"pad": "</s>"}, vocab_files=("spiece.model",), siglip=True),
    "Siglip2Tokenizer": TokenizerClass(_siglip2, _GEMMA, pad_left=True, vocab_files=("tokenizer.model",)),
    "GemmaTokenizer": TokenizerClass(_gemma, _GEMMA, pad_left=True, vocab_files=("tokenizer.model",)),
    "T5Tokenizer": TokenizerClass(_t5, _T5, vocab_files=("spiece.model",)),
    "XLMRobertaTokenizer": TokenizerClass(_xlm_roberta, _XLM_ROBERTA, vocab_files=("sentencepiece.bpe.model",)),
    "BertTokenizer": TokenizerClass(_bert, _BERT, vocab_files=("vocab.txt",)),
    "CLIPTokenizer": TokenizerClass(_clip, _CLIP, vocab_files=("vocab.json", "merges.txt")),
    "PreTrainedTokenizer": TokenizerClass(_as_it_is, {}, as_it_is=True),
    "TokenizersBackend": TokenizerClass(_as_it_is, {}, as_it_is=True),
}
# What is taken where a folder names no class: by what its config.json says of the model.
BY_MODEL_TYPE = {
    "clip": "CLIPTokenizer",
    "metaclip_2": "XLMRobertaTokenizer",
    "siglip": "SiglipTokenizer",
    "siglip2": "Siglip2Tokenizer",
}
# The folders of these models are known to name a wrong one.
NOT_ASKED = ("siglip2",)
