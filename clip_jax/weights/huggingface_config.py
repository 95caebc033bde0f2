"""Hugging Face's `config.json`: the architecture that it says, and what it can say at all.

A field that a file leaves out has the default of its class in `transformers`; the two families have their own. What no
field says, all models of a family share.
"""

import dataclasses
import functools
import reprlib
from typing import Any

from clip_jax.architecture import Architecture, ResNetTower, TextTower, ViTTower
from clip_jax.checked import leaves
from clip_jax.errors import UserError, all_of
from clip_jax.tokenizer import SOT

# Our fields, and theirs.
TOWER = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
IMAGE = {"image_size": "image_size", "patch_size": "patch_size"} | TOWER
TEXT = {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"} | TOWER
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # their words, and ours

# The `eos_token_id` that stands for no id: early configs have it by mistake, and `transformers` goes on to pool their
# texts at the largest id.
ARGMAX = 2


@dataclasses.dataclass(frozen=True)
class Family:
    """What one of their classes computes, whatever its config says; in our words, but for the defaults."""

    model: str  # the class
    model_type: str  # its name in a config
    processor: str  # of its images, where a config does not name the class
    image: dict[str, Any]
    text: dict[str, Any]
    text_pools: tuple[str, ...]
    logit_bias: bool
    image_defaults: dict[str, Any]
    text_defaults: dict[str, Any]


CLIP = Family(
    "CLIPModel",
    "clip",
    "CLIPImageProcessor",
    image={"kind": "vit", "pool": "class", "class_token": True, "pre_norm": True, "norm_after_pool": False}
    | {"patch_bias": False, "projection": True},
    text={"causal": True, "projection": True, "projection_bias": False},
    text_pools=("argmax", "eos"),
    logit_bias=False,
    image_defaults={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
    text_defaults={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    | {"eos_token_id": 49407},
)
SIGLIP = Family(
    "SiglipModel",
    "siglip",
    "SiglipImageProcessor",
    image={"kind": "vit", "pool": "map", "class_token": False, "pre_norm": False, "norm_after_pool": False}
    | {"patch_bias": True, "projection": False},
    text={"causal": False, "projection": True, "projection_bias": True},
    text_pools=("last",),
    logit_bias=True,
    image_defaults={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    | {"num_channels": 3, "vision_use_head": True},
    text_defaults={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"max_position_embeddings": 64, "vocab_size": 32000, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    | {"projection_size": None},
)
FAMILIES = {family.model_type: family for family in (CLIP, SIGLIP)}
CLIP_PROJECTION_DIM = 512  # CLIPConfig's default

# What a config may say only so.
REQUIRED = {"num_channels": 3, "vision_use_head": True}

REFUSED = {
    "siglip2": "SigLIP 2 NaFlex takes images of any shape, which no tower here does; its models of one fixed "
    "resolution, such as google/siglip2-base-patch16-224, are of type 'siglip'",
}


def family_of(config: Any) -> Family:
    """Returns the family that a config.json names.

    Raises:
        UserError: it names none, or one that is not known here.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = " or ".join(f"{name!r} ({family.model})" for name, family in FAMILIES.items())
    why = f"; {REFUSED[model_type]}" if isinstance(model_type, str) and model_type in REFUSED else ""
    raise UserError(f"model_type={reprlib.repr(model_type)} should be {known}{why}")


def architecture_of(config: Any) -> Architecture:
    """Returns what `transformers` would build for a config.json; its preprocessing and its tokenizer other files say.

    Raises:
        UserError: a model of another family, or values that are wrong or not known here; all of them.
    """
    family = family_of(config)
    image, text = all_of(
        lambda: _section(config, "vision_config", family.image_defaults, family),
        lambda: _section(config, "text_config", family.text_defaults, family),
    )
    embed_dim, image_tower, text_tower, _ = all_of(
        lambda: _embed_dim(config, text, family),
        lambda: ViTTower(**_values(image, "vision_config.", IMAGE), **family.image),
        lambda: _text_tower(text, family),
        lambda: _check_required(config, image),
    )
    return Architecture(embed_dim, image_tower, text_tower, logit_bias=family.logit_bias)


def image_size_of(config: Any) -> int:
    """Returns the image size that a config.json says.

    Raises:
        UserError: as `architecture_of`.
    """
    family = family_of(config)
    return _value(_section(config, "vision_config", family.image_defaults, family), "vision_config.", "image_size")


def config_of(architecture: Architecture) -> dict[str, Any]:
    """Returns the config.json with which `transformers` computes this architecture.

    Raises:
        UserError: neither family can hold it; says all that the nearer one would take for something else.
    """
    if isinstance(architecture.image, ResNetTower):
        raise UserError("Hugging Face's CLIPModel has no ResNet; choose another format")
    losses = {family.model_type: _lost(architecture, family) for family in FAMILIES.values()}
    family = FAMILIES[min(losses, key=lambda name: len(losses[name]))]
    if lost := losses[family.model_type]:
        raise UserError(
            f"Hugging Face's {family.model} cannot hold it, it would compute {'; '.join(lost)}; choose another format"
        )
    image, text, embed_dim = architecture.image, architecture.text, architecture.embed_dim
    vision_config = {theirs: _their_word(getattr(image, ours)) for ours, theirs in IMAGE.items()}
    text_config = {theirs: _their_word(getattr(text, ours)) for ours, theirs in TEXT.items()}
    text_config["bos_token_id"] = SOT if architecture.tokenize.kind == "clip" else None
    text_config["eos_token_id"] = ARGMAX if text.pool == "argmax" else text.eos_id
    text_config["pad_token_id"] = architecture.tokenize.pad_id
    joint = {"projection_dim": embed_dim} if family is CLIP else {}
    return {
        "architectures": [family.model],
        "model_type": family.model_type,
        **joint,
        "text_config": {"model_type": f"{family.model_type}_text_model"}
        | text_config
        | (joint or {"projection_size": embed_dim}),
        "vision_config": {"model_type": f"{family.model_type}_vision_model"} | vision_config | joint,
    }


def _section(config: dict[str, Any], name: str, defaults: dict[str, Any], family: Family) -> dict[str, Any]:
    """Returns what a config says of one tower, defaults filled in.

    A CLIP's may say it twice: early releases wrote `text_config_dict` beside `text_config`, and `transformers` gives
    the former the last word, with the defaults of what it leaves out.
    """
    given, legacy = config.get(name), config.get(f"{name}_dict") if family is CLIP else None
    for at, value in ((name, given), (f"{name}_dict", legacy)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{at}={reprlib.repr(value)} should be an object")
    return defaults | (given or {}) | ({} if legacy is None else defaults | legacy)


def _values(section: dict[str, Any], at: str, fields: dict[str, str]) -> dict[str, Any]:
    """Returns our fields of a tower."""
    values = all_of(*(functools.partial(_value, section, at, theirs) for theirs in fields.values()))
    return dict(zip(fields, values, strict=True))


def _value(section: dict[str, Any], at: str, name: str) -> Any:
    """Returns the value of one of their fields, as ours has it."""
    value = section[name]
    if name == "hidden_act":
        if isinstance(value, str) and value in ACTIVATIONS:
            return ACTIVATIONS[value]
        raise UserError(f"{at}{name}={reprlib.repr(value)} is not one of {', '.join(ACTIVATIONS)}")
    if name in ("image_size", "patch_size") and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    kind = float if name == "layer_norm_eps" else int
    if type(value) is kind:
        return value
    raise UserError(f"{at}{name}={reprlib.repr(value)} should be {kind.__name__}")


def _their_word(value: Any) -> Any:
    return {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(value, value)


def _embed_dim(config: dict[str, Any], text: dict[str, Any], family: Family) -> int:
    """Returns the width of the joint space."""
    if family is CLIP:
        return _value({"projection_dim": CLIP_PROJECTION_DIM} | config, "", "projection_dim")
    return _value(text, "text_config.", "hidden_size" if text["projection_size"] is None else "projection_size")


def _text_tower(text: dict[str, Any], family: Family) -> TextTower:
    fields, pool = all_of(lambda: _values(text, "text_config.", TEXT), lambda: _text_pool(text, family))
    return TextTower(**fields, **pool, **family.text)


def _text_pool(text: dict[str, Any], family: Family) -> dict[str, Any]:
    """Returns our fields that say which position stands for a caption."""
    if family is not CLIP:
        return {"pool": "last"}
    eos_id, vocab_size = (_value(text, "text_config.", name) for name in ("eos_token_id", "vocab_size"))
    if eos_id in (ARGMAX, vocab_size - 1):  # the first of the last id of all is the first of the largest
        return {"pool": "argmax"}
    return {"pool": "eos", "eos_id": eos_id}


def _check_required(config: dict[str, Any], image: dict[str, Any]) -> None:
    wrong = [
        f"vision_config.{name}={reprlib.repr(image[name])} should be {value}"
        for name, value in REQUIRED.items()
        if name in image and image[name] != value
    ]
    if config.get("quantization_config") is not None:
        wrong.append("quantization_config: its weights are quantised; take the model they were made of")
    if wrong:
        raise UserError("; ".join(wrong))


def _lost(architecture: Architecture, family: Family) -> list[str]:
    """Returns what the family would take for something else, with both values."""
    found = {path: value for path, _, value in leaves(architecture)}
    shared = {f"image.{name}": value for name, value in family.image.items()}
    shared |= {f"text.{name}": value for name, value in family.text.items()} | {"logit_bias": family.logit_bias}
    lost = [
        f"{path}={value!r} for {found[path]!r}" for path, value in shared.items() if found.get(path, value) != value
    ]
    if (pool := architecture.text.pool) not in family.text_pools:
        lost.append(f"text.pool={' or '.join(map(repr, family.text_pools))} for {pool!r}")
    if pool in family.text_pools and architecture.text.eos_id == ARGMAX:
        lost.append(f"text.pool='argmax' for 'eos', which is what eos_token_id={ARGMAX} means to it")
    return lost
