"""Small tokenizers of every kind, trained or made up here, in folders as the hubs have them.

The SentencePiece models are trained on captions, on words of CLIP's vocabulary and on strings of all scripts, with the
settings of the released ones: Unigram with NFKC (T5, SigLIP), Unigram with bytes for what it has not (mT5), and BPE
with bytes, which leaves text as it is (Gemma).
"""

import io
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from oracles import require
from test_tokenizer import FAMILIES, ascii_pairs, captions, pieces, scripts, texts_of
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from clip_jax.tokenizer import clip
from clip_jax.weights import sentencepiece_model as spm

_UNIGRAM = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
MODELS = {
    "t5": _UNIGRAM,
    "mt5": _UNIGRAM | {"byte_fallback": True},
    "gemma": {
        "model_type": "bpe",
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "user_defined_symbols": ["<mask>", "<start_of_turn>"],
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
}
# What a special token looks like when somebody writes it into a caption.
LITERALS = ("</s>", "<unk>", "<pad>", "<s>", "<eos>", "<bos>", "<mask>", "[SEP]", "[CLS]", "<extra_id_3>")


@lru_cache(maxsize=1)
def strings() -> list[str]:
    """Returns more than 20,000 distinct strings: those that CLIP's tokenizer is held to, of the pairs of ASCII one in
    six, some with special tokens written out, and some that repeat a few letters, which can be cut in several ways that
    are as good. Half a surrogate pair is U+FFFD here: transformers refuses it."""
    texts = {text for family in FAMILIES for text in texts_of(*family)[:: 6 if family[0] is ascii_pairs else 1]}
    rng = random.Random("literals")
    words = [*LITERALS, " ", "a dog", ". ", "日", "é", "▁", "’", "\u3000x", "ΑΣ"]
    texts |= {"".join(rng.choices(words, k=6)) for _ in range(500)}
    texts |= {"".join(rng.choices("aab′o hz", k=rng.randint(9, 150))) for _ in range(500)}
    return sorted({text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts})


@lru_cache(maxsize=3)
def sentencepiece_model(name: str) -> bytes:
    """Returns a small model trained with the settings of a name of `MODELS`, or skips the test."""
    rng = random.Random("sentencepiece")
    words = [word for word in (clip.decode([id]).strip() for id in range(512, 49_406)) if "\ufffd" not in word]
    texts = captions(rng, 500) + scripts(rng, 300) + pieces(rng, 300)
    texts += [" ".join(rng.choices(words, k=8)) for _ in range(3000)]
    clean = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    file = io.BytesIO()
    require("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\n", " ").replace("\0", " ") for text in clean]),
        model_writer=file,
        vocab_size=3000,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
        **MODELS[name],
    )
    return file.getvalue()


def write_folder(path: Path, config: dict[str, Any] | None, **files: bytes | str | dict) -> Path:
    """Returns a folder with a tokenizer_config.json and other files; in their names __ stands for a dot."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in (files | ({} if config is None else {"tokenizer_config__json": config})).items():
        text = json.dumps(content, ensure_ascii=False) if isinstance(content, dict) else content
        (path / name.replace("__", ".")).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BOS, EOS, PAD, UNK = range(4)
WORDS = ["<bos>", "<eos>", "<pad>", "<unk>", "a", "dog", "cat", "and", "日", "the", "digit", "number", "handwritten"]


def few_words() -> str:
    """Returns a tokenizer.json of a few words; it asks for truncation and padding, which are not its to do."""
    made = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<bos>", BOS), ("<eos>", EOS)]
    made.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    made.add_special_tokens(WORDS[:4])
    made.enable_truncation(3)
    made.enable_padding(length=5, pad_id=7)
    return made.to_str()


# --- folders as they are on the hubs ---

_SIGLIP_FLAGS = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127)), "dog", "a", "the", "é", "日"]
BERT_WORDS += [f"##{word}" for word in [*map(chr, range(33, 127)), "og", "日"]]


def siglip(path: Path, model: str = "t5") -> Path:
    """google/siglip-…: SentencePiece itself."""
    config = {
        "tokenizer_class": "SiglipTokenizer",
        "added_tokens_decoder": {
            "1": {"content": "</s>"} | _SIGLIP_FLAGS,
            "2": {"content": "<unk>"} | _SIGLIP_FLAGS,
        },
        "additional_special_tokens": [],
        "do_lower_case": True,
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 64,
        "sp_model_kwargs": {},
    }
    return write_folder(path, config, spiece__model=sentencepiece_model(model))


def t5(path: Path, model: str = "t5", **config) -> Path:
    """google/mt5-…: a model alone."""
    return write_folder(path, {"tokenizer_class": "T5Tokenizer"} | config, spiece__model=sentencepiece_model(model))


def t5_file(path: Path) -> Path:
    """timm/ViT-…-SigLIP: a tokenizer.json that the fourth version of transformers wrote."""
    model = spm.read(sentencepiece_model("t5"))
    tokenizer = Tokenizer(models.Unigram([(piece.text, piece.score) for piece in model.pieces], 2, False))
    steps = [
        normalizers.Precompiled(model.charsmap),
        normalizers.Strip(left=False),
        normalizers.Replace(Regex(" {2,}"), "▁"),
    ]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    tokenizer.enable_truncation(7)  # whatever was last asked of it is in the file, too
    tokenizer.enable_padding(pad_id=1, pad_token="</s>", length=7)
    config = {
        "tokenizer_class": "T5Tokenizer",
        "additional_special_tokens": [],
        "eos_token": "</s>",
        "extra_ids": 0,
        "legacy": False,
        "model_max_length": 64,
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    return write_folder(path, config, tokenizer__json=tokenizer.to_str())


def gemma(path: Path, **config) -> Path:
    """google/siglip2-…, before anybody made a tokenizer.json of it."""
    known = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
    }
    return write_folder(path, known | config, tokenizer__model=sentencepiece_model("gemma"))


def xlm_roberta(path: Path) -> Path:
    """facebook/xlm-v-base."""
    config = {"tokenizer_class": "XLMRobertaTokenizer"}
    return write_folder(path, config, sentencepiece__bpe__model=sentencepiece_model("t5"))


def bert(path: Path, **config) -> Path:
    """bert-base-uncased."""
    return write_folder(path, {"tokenizer_class": "BertTokenizer"} | config, vocab__txt="\n".join(BERT_WORDS) + "\n")
