"""The keys of `open_clip_config.json`: what each may say, and what OpenCLIP takes where it says nothing.

A value that switches on what is not computed here is refused as a wrong one is: to pass it over would change the
numbers, and nobody would know.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from clip_jax.architecture import LARGEST_SIZE
from clip_jax.errors import UserError

POOLS = {"tok": "class", "avg": "mean"}  # an image tower's pool: its word → ours
CLEANING = ("whitespace", "lower", "canonicalize")
EPS = 1e-5  # PyTorch's, for a layer norm
LONGEST_VALUE = 100  # characters in an error


class Key(NamedTuple):
    """What a key of a config may say."""

    default: Any  # what OpenCLIP takes where the key is not there
    understand: Callable[[Any], Any]  # makes a value ours, or raises UserError with the rule


def understood(says: Any, at: str, keys: Mapping[str, Key], problems: list[str]) -> dict[str, Any]:
    """Returns a value for each key: what is said, made ours; the default where nothing is said, or something wrong."""
    if type(says) is not dict:
        problems.append(f"{at}={shown(says)} should be an object")
        says = {}
    problems += [f"{at}.{shown(name)[1:-1]} is not known" for name in says if name not in keys]
    values = {}
    for name, key in keys.items():
        try:
            values[name] = key.understand(says.get(name, key.default))
        except UserError as error:
            problems.append(f"{at}.{name}={shown(says.get(name, key.default))} {error}")
            values[name] = key.understand(key.default)
    return values


def shown(value: Any) -> str:
    """Returns a value as an error shows it, its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _any(value: Any) -> Any:
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise UserError("should be true or false")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= LARGEST_SIZE:  # NaN is not
        raise UserError(f"should be a number up to {LARGEST_SIZE}")
    return float(value)


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_SIZE:
        raise UserError(f"should be a whole number from 0 to {LARGEST_SIZE}")
    return value


def _size(value: Any) -> int:
    """Returns a whole number; a square's side may be given twice."""
    if type(value) is list and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
        raise UserError(f"should be a whole number from 1 to {LARGEST_SIZE}")
    return value


def _maybe(understand: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value if value is None else understand(value)


def _layers(value: Any) -> int | tuple[int, ...]:
    """Returns the blocks of a ViT, or the bottlenecks of a ResNet's stages."""
    if type(value) is not list:
        return _size(value)
    if len(value) != 4:
        raise UserError("should be a whole number, or four for a ResNet")
    return tuple(_size(n) for n in value)


def _one_of(*words: Any) -> Callable[[Any], Any]:
    """Returns what passes these words: with others OpenCLIP computes something that is not computed here."""

    def understand(value: Any) -> Any:
        if value not in words:
            raise UserError(f"is not computed here, only {' or '.join(map(repr, words))}")
        return value

    return understand


def _activation(value: Any) -> str | None:
    """Returns the GELU that `act_kwargs` choose, None where they choose none."""
    words = {(): None, (("approximate", "none"),): "gelu", (("approximate", "tanh"),): "gelu_tanh"}
    says = tuple(value.items()) if type(value) is dict else ()
    if (value is not None and type(value) is not dict) or not all(type(x) is str for pair in says for x in pair):
        raise UserError("should be an object with 'approximate'")
    if says not in words:
        raise UserError("is not computed here, only {'approximate': 'tanh'} or {'approximate': 'none'}")
    return words[says]


def _eps(value: Any) -> float:
    """Returns the epsilon that `norm_kwargs` choose."""
    if value is not None and (type(value) is not dict or not value.keys() <= {"eps"}):
        raise UserError("should be an object with 'eps' alone")
    return _number((value or {}).get("eps", EPS))


ANYTHING = Key(None, _any)
OFF, UNSET, FALSE = Key(False, _one_of(False)), Key(None, _one_of(None)), Key(False, _flag)
MODEL = {
    "embed_dim": Key(None, _maybe(_size)),
    "vision_cfg": ANYTHING,
    "text_cfg": ANYTHING,
    "quick_gelu": FALSE,
    "init_logit_bias": Key(None, _maybe(_number)),
    "multimodal_cfg": UNSET,  # CoCa's
    # all one to a model whose weights are read
    **dict.fromkeys(("custom_text", "init_logit_scale", "nonscalar_logit_scale", "output_dict"), ANYTHING),
}
BLOCKS = {
    "block_type": Key(None, _one_of(None, "default")),
    "ls_init_value": UNSET,
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), OFF
    ),
    "output_tokens": OFF,
    "act_kwargs": Key(None, _activation),
    "norm_kwargs": Key(None, _eps),
    "mlp_ratio": Key(4.0, _number),
}
VISION = BLOCKS | {
    "image_size": Key(224, _size),
    "layers": Key(12, _layers),
    "width": Key(768, _size),
    "patch_size": Key(16, _maybe(_size)),
    "head_width": Key(64, _size),
    "no_ln_pre": FALSE,
    "pool_type": Key("tok", _one_of(*POOLS)),
    "final_ln_after_pool": FALSE,
    "attentional_pool": OFF,
    "timm_model_name": ANYTHING,
    "timm_pool": Key("avg", _any),
    "timm_proj": Key("linear", _any),
    # of training, or without effect where the others are as they must be
    **dict.fromkeys(("patch_dropout", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads"), ANYTHING),
    **dict.fromkeys(("timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path"), ANYTHING),
}
TEXT = BLOCKS | {
    "context_length": Key(77, _size),
    "vocab_size": Key(49408, _size),
    "width": Key(512, _size),
    "heads": Key(8, _size),
    "layers": Key(12, _size),
    "no_causal_mask": FALSE,
    "pool_type": Key("argmax", _one_of("argmax", "eos", "last")),
    "eos_id": Key(2, _id),
    "proj_type": Key("linear", _one_of("linear", "none")),
    "proj_bias": FALSE,
    "embed_cls": OFF,
    "hf_model_name": UNSET,
    "hf_tokenizer_name": ANYTHING,
    "tokenizer_mode": UNSET,
    "tokenizer_kwargs": ANYTHING,
    # without effect where the others are as they must be
    **dict.fromkeys(("pad_id", "final_ln_after_pool"), ANYTHING),
    **dict.fromkeys(("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"), ANYTHING),
}
CLIP_TOKENIZER = {"clean": Key("lower", _one_of(*CLEANING))}
FILE_TOKENIZER = {"clean": Key("whitespace", _one_of(*CLEANING)), "strip_sep_token": Key(False, _flag)}
